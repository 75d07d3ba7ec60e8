"""Mistakes are answered as SB3 and sb3-contrib answer them: the same kind, findable by the same words."""

import re
from typing import Any

import pytest
import sb3_contrib
from envs import make
from stable_baselines3 import PPO

import sb3_trpo_ext
from sb3_trpo_ext import PPOClip, PPOPenalty, RecurrentPPOClip

TRUNCATED = [
    "You have specified a mini-batch size of 5",
    "`n_steps * n_envs = 32`",
    "after every 6 untruncated mini-batches",
    "there will be a truncated mini-batch of size 2",
    "`batch_size` that is a factor of `n_steps * n_envs`",
    "(n_steps=32 and n_envs=1)",
]


@pytest.mark.parametrize("algorithm", [PPO, PPOClip, PPOPenalty, RecurrentPPOClip, sb3_contrib.TRPO, sb3_trpo_ext.TRPO])
@pytest.mark.parametrize("words", TRUNCATED)
def test_a_truncated_mini_batch(algorithm: Any, words: str) -> None:
    options = {"critic": "adam"} if algorithm is sb3_trpo_ext.TRPO else {}
    with pytest.warns(UserWarning, match=re.escape(words)) as caught:
        make(algorithm, n_steps=32, batch_size=5, **options)
    assert sum("truncated" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize("algorithm", [PPO, PPOClip, PPOPenalty, RecurrentPPOClip])
@pytest.mark.parametrize(("n_steps", "batch_size"), [(32, 8), (32, 32), (5, 5)])
def test_a_whole_number_of_mini_batches(
    algorithm: Any, n_steps: int, batch_size: int, recwarn: pytest.WarningsRecorder
) -> None:
    make(algorithm, n_steps=n_steps, batch_size=batch_size)
    assert not any("mini-batch" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("algorithm", [PPO, PPOClip, PPOPenalty, RecurrentPPOClip])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 1}, ["`batch_size` must be greater than 1"]),
        (
            {"n_steps": 1},
            ["`n_steps * n_envs` must be greater than 1", "Currently n_steps=1 and n_envs=1"],
        ),
        ({"clip_range_vf": -0.5}, ["`clip_range_vf` must be positive", "pass `None` to deactivate"]),
        ({"clip_range_vf": 0}, ["`clip_range_vf` must be positive"]),
    ],
    ids=str,
)
def test_assertions(algorithm: Any, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(AssertionError) as raised:
        make(algorithm, **{"batch_size": 8, **options})
    assert all(each in str(raised.value) for each in words)


@pytest.mark.parametrize("algorithm", [sb3_contrib.TRPO, sb3_trpo_ext.TRPO])
def test_assertions_of_trpo(algorithm: Any) -> None:
    with pytest.raises(AssertionError, match=r"`n_steps \* n_envs` must be greater than 1.*Currently n_steps=1 and"):
        make(algorithm, n_steps=1)
