"""``final_n_steps``: rollouts that change their length with the progress of training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from envs import make
from stable_baselines3.common.callbacks import BaseCallback

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, RecurrentTRPO


class Lengths(BaseCallback):
    """The steps of every rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def _on_rollout_start(self) -> None:
        self.lengths.append(0)

    def _on_step(self) -> bool:
        self.lengths[-1] += 1
        return True


def lengths(model: Any, total: int) -> list[int]:
    callback = Lengths()
    model.learn(total, callback=callback)
    return callback.lengths


@pytest.mark.parametrize(
    ("algorithm", "observation", "fast"),
    [
        (TRPO, "vector", True),
        (TRPO, "vector", False),
        (TRPO, "dict", True),
        (RecurrentTRPO, "vector", True),
        (MaskableTRPO, "vector", True),
    ],
)
@pytest.mark.parametrize("final", [64, 4])
def test_rollouts_go_from_one_length_to_the_other(algorithm: Any, observation: str, fast: bool, final: int) -> None:
    options = {"n_steps": 16, "final_n_steps": final, "fast_rollouts": fast, "critic": "adam"}
    model = make(algorithm, observation=observation, **options)
    seen = lengths(model, 300)
    assert seen[0] == 16 and (seen == sorted(seen)) == (final > 16)
    samples = np.cumsum(seen)
    expected = 16 * (final / 16) ** (np.concatenate([[0], samples[:-1]]) / 300)
    np.testing.assert_array_equal(seen, np.round(expected))
    assert model._n_updates >= len(seen)
    assert model.rollout_buffer.buffer_size == seen[-1]


def test_the_length_does_not_go_beyond_the_last() -> None:
    model = make(TRPO, n_steps=16, final_n_steps=64)
    model.num_timesteps, model._total_timesteps = 130, 100
    assert model.rollout_steps() == 64


def test_a_saved_model_begins_where_it_was_asked_to(tmp_path: Path) -> None:
    model = make(TRPO, n_steps=16, final_n_steps=64)
    model.learn(200)
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env=model.env)
    assert (loaded.n_steps, loaded.final_n_steps) == (16, 64)
    assert lengths(loaded, 100)[0] == 16


def test_without_it_every_rollout_has_n_steps() -> None:
    assert set(lengths(make(TRPO, n_steps=16), 64)) == {16}


@pytest.mark.parametrize("value", [0, -1, 2.5, "many", True])
def test_an_impossible_length_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="`final_n_steps`"):
        make(TRPO, final_n_steps=value)


def test_npg_says_what_to_use() -> None:
    with pytest.raises(TypeError, match=r"final_n_steps.*use the class TRPO"):
        make(NPG, final_n_steps=64)
