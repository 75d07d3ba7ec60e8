"""What is remembered from update to update belongs to one environment and one policy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from envs import SMALL, RandomEnv, make
from stable_baselines3.common.vec_env import DummyVecEnv
from test_recurrent import collected

from sb3_trpo_ext import TRPO, MaskableTRPO, RecurrentNPG, RecurrentPPOClip, RecurrentTRPO

REMEMBERING: dict[str, tuple[Any, dict[str, Any]]] = {
    "momentum": (TRPO, {"momentum": 0.9}),
    "reuse": (TRPO, {"sample_reuse": 3}),
    "both": (TRPO, {"momentum": 0.9, "sample_reuse": 2, "target_kl": 0.001}),
    "recurrent": (RecurrentTRPO, {"momentum": 0.9}),
    "maskable": (MaskableTRPO, {"sample_reuse": 2}),
}


@pytest.fixture(params=REMEMBERING)
def trained(request: pytest.FixtureRequest) -> Any:
    algorithm, options = REMEMBERING[request.param]
    model = make(algorithm, **options).learn(96)
    assert remembers(model)
    return model


def remembers(model: Any) -> bool:
    return model.gradient_memory is not None or bool(model._past_rollouts)


def other_env() -> DummyVecEnv:
    return DummyVecEnv([lambda: RandomEnv(episode_length=3)])


def replaced(model: Any, how: str, folder: Path) -> Any:
    """The model, or a loaded copy, after something of it was replaced."""
    if how == "set_env":
        model.set_env(other_env())
    elif how == "set_env without reset":
        model.set_env(other_env(), force_reset=False)
    elif how == "set_parameters":
        parameters = model.get_parameters()
        parameters["policy"] = {name: value + 0.1 for name, value in parameters["policy"].items()}
        model.set_parameters(parameters)
    else:
        model.save(folder / "model")
        return type(model).load(folder / "model", env=other_env() if how == "load" else None, device="cpu")
    return model


HOW = ["set_env", "set_env without reset", "set_parameters", "load", "load without environment"]


@pytest.mark.parametrize("how", HOW)
def test_memory_is_dropped_with_what_it_belongs_to(trained: Any, how: str, tmp_path: Path) -> None:
    model = replaced(trained, how, tmp_path)
    assert model.gradient_memory is None and model._past_rollouts == ()
    if how != "load without environment":
        model.learn(32, reset_num_timesteps=False)
        assert len(model._past_rollouts) <= 1
        assert model.logger.name_to_value.get("train/momentum", 0.0) == 0.0
        model.learn(64)
        assert remembers(model)


def test_the_first_update_elsewhere_is_that_of_a_model_without_a_past(trained: Any, tmp_path: Path) -> None:
    fresh = make(type(trained), **{name: getattr(trained, name) for name in ("momentum", "sample_reuse")})
    fresh.target_kl = trained.target_kl
    fresh.set_parameters(trained.get_parameters())
    for model in (trained, fresh):
        model.set_env(other_env())
        model.env.seed(3)
        model.set_random_seed(3)
        model._current_progress_remaining = 1.0
        model.learn(32)
    for one, other in zip(trained.policy.parameters(), fresh.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_memory_stays_in_the_same_environment_with_the_same_policy(trained: Any) -> None:
    memory, past = trained.gradient_memory, trained._past_rollouts
    trained.set_env(trained.env)
    assert trained.gradient_memory is memory and trained._past_rollouts is past


def test_a_file_of_an_older_version_brings_no_memory_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(TRPO, momentum=0.9).learn(64)
    excluded = model._excluded_save_params()
    monkeypatch.setattr(TRPO, "_excluded_save_params", lambda self: [e for e in excluded if e != "gradient_memory"])
    model.save(tmp_path / "model")
    assert TRPO.load(tmp_path / "model", env=other_env()).gradient_memory is None


@pytest.mark.parametrize("how", ["set_env", "load", "learn again"])
def test_growing_rollouts_begin_again_with_n_steps(how: str, tmp_path: Path) -> None:
    model = make(TRPO, n_steps=16, final_n_steps=64).learn(200)
    assert model.rollout_buffer.buffer_size > 16
    model = replaced(model, how, tmp_path) if how != "learn again" else model
    model.learn(16)
    assert model.rollout_buffer.buffer_size == 16


@pytest.mark.parametrize("algorithm", [RecurrentTRPO, RecurrentNPG, RecurrentPPOClip])
@pytest.mark.parametrize("how", HOW)
def test_hidden_states_begin_at_zero(algorithm: Any, how: str, tmp_path: Path) -> None:
    options = {"batch_size": 16} if algorithm is RecurrentPPOClip else {}
    model = make(algorithm, **options).learn(40)
    assert any(bool((state != 0).any()) for pair in model._last_lstm_states for state in pair)
    model = replaced(model, how, tmp_path)
    assert all(bool((state == 0).all()) for pair in model._last_lstm_states for state in pair)


def test_hidden_states_have_the_shape_of_the_new_environments(tmp_path: Path) -> None:
    model = collected(n_envs=3)
    model.save(tmp_path / "model")
    loaded = RecurrentTRPO.load(tmp_path / "model", env=collected(n_envs=2).env, device="cpu")
    for pair in loaded._last_lstm_states:
        for state in pair:
            assert state.shape == (1, 2, 6) and not state.any()
    loaded.learn(48)


def test_reported_reasons_are_reported_again_in_another_environment() -> None:
    model = make(TRPO)
    model._report_rejection("it is a test")
    model.set_env(other_env())
    assert model._reported_rejections == [] and model._rejections_in_a_row == 0


def test_an_environment_may_be_set_before_the_networks_are_made() -> None:
    model = TRPO("MlpPolicy", RandomEnv(), **SMALL, _init_setup_model=False)
    model.set_env(other_env())
    model._setup_model()
    model.learn(32)
    assert np.all(model.rollout_buffer.values != 0)
