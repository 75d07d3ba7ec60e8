import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from envs import OBSERVATION_SPACES, RandomEnv, make
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, PPOClip, PPOPenalty, RecurrentPPOClip, RecurrentTRPO
from sb3_trpo_ext.critic.adam import AdamCritic
from sb3_trpo_ext.training.first_order import FirstOrderAlgorithm

ARMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gauss-newton": (
        TRPO,
        {
            "critic": "gauss_newton",
            "critic_kwargs": {"damping": 0.2},
            "kl_per_action_dim": False,
            "fisher_chunk_size": 20,
        },
    ),
    "adam": (TRPO, {"critic": "adam", "batch_size": 16, "target_kl": lambda p: 0.01 + 0.01 * p, "ent_coef": 0.01}),
    "max": (TRPO, {"trust_region": "max", "kl_penalty": 3.0, "ent_coef": lambda p: 0.01 * p}),
    "npg": (NPG, {"step_size": lambda p: 0.1 * p}),
    "ppo": (PPOClip, {"batch_size": 16, "max_kl": 0.05, "clip_range": lambda p: 0.1 + 0.1 * p}),
    "ppo-penalty": (PPOPenalty, {"batch_size": 16, "target_kl": 1e-4, "kl_coef_bounds": (0.1, 10.0)}),
    "recurrent": (RecurrentTRPO, {"policy_kwargs": {"enable_critic_lstm": False, "lstm_hidden_size": 8}}),
    "recurrent-ppo": (RecurrentPPOClip, {"batch_size": 16, "policy_kwargs": {"lstm_hidden_size": 8}}),
    "maskable": (MaskableTRPO, {"action": "multidiscrete"}),
}


@pytest.fixture(params=ARMS)
def model(request: pytest.FixtureRequest) -> Any:
    algorithm, options = ARMS[request.param]
    return make(algorithm, **{"action": "box", **options}).learn(64)


def test_a_saved_model_predicts_and_trains_on(model: Any, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", env=model.env, device="cpu")
    space = OBSERVATION_SPACES["vector"]
    for _ in range(5):
        sample = space.sample()
        expected = model.predict(sample, deterministic=True)[0]
        np.testing.assert_array_equal(loaded.predict(sample, deterministic=True)[0], expected)
    for name in (
        "critic",
        "critic_kwargs",
        "kl_per_action_dim",
        "fisher_chunk_size",
        "max_kl",
        "batch_size",
        "trust_region",
        "kl_penalty",
        "kl_coef",
        "kl_coef_bounds",
    ):
        assert getattr(loaded, name, None) == getattr(model, name, None)
    assert loaded.entropy_weight() == model.entropy_weight()
    for name in ("target_kl", "clip_range", "step_size"):
        if callable(getattr(model, name, None)):
            assert getattr(loaded, name)(0.5) == getattr(model, name)(0.5)
    updates = loaded._n_updates
    loaded.learn(64, reset_num_timesteps=False)
    assert loaded.num_timesteps == 128
    assert loaded._n_updates > updates


def test_continuing_from_a_file_is_continuing(model: Any, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", env=model.env, device="cpu")
    for each in (model, loaded):
        each.env.seed(5)
        each.env.reset()
        each.set_random_seed(5)
        each._last_obs = None
        each.learn(64, reset_num_timesteps=False)
    for mine, peer in zip(loaded.policy.parameters(), model.policy.parameters(), strict=True):
        assert torch.equal(mine, peer)


def test_another_number_of_environments(model: Any, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    env = make_vec_env(lambda: RandomEnv(model.observation_space, model.action_space), n_envs=3)
    loaded = type(model).load(tmp_path / "model", env=env, device="cpu")
    loaded.learn(96)
    assert loaded.rollout_buffer.n_envs == 3


def test_set_env(model: Any) -> None:
    model.set_env(RandomEnv(model.observation_space, model.action_space, episode_length=3))
    model.learn(64)
    assert model.ep_info_buffer[-1]["l"] == 3


def test_a_truncated_file_is_refused_and_nothing_is_lost(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    model.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = [param.detach().clone() for param in model.policy.parameters()]
    for read in (type(model).load, model.set_parameters):
        with pytest.raises((ValueError, AssertionError), match=r"zip|No data found|do not match"):
            read(str(path))
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
def test_a_policy_in_use_can_be_copied(model: Any, copied: Any) -> None:
    sample = OBSERVATION_SPACES["vector"].sample()
    twin = copied(model.policy)
    np.testing.assert_array_equal(
        twin.predict(sample, deterministic=True)[0], model.predict(sample, deterministic=True)[0]
    )


def test_the_optimiser_comes_back(model: Any, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", device="cpu")
    mine, theirs = (each.policy.optimizer.state_dict()["state"] for each in (loaded, model))
    assert mine.keys() == theirs.keys()
    assert bool(mine) == (isinstance(model, FirstOrderAlgorithm) or isinstance(model.value_critic, AdamCritic))
    assert all(torch.equal(mine[i][key], value) for i in theirs for key, value in theirs[i].items())


def test_policies_and_parameters_copy(model: Any, request: pytest.FixtureRequest) -> None:
    sample = OBSERVATION_SPACES["vector"].sample()
    copied = pickle.loads(pickle.dumps(model.policy.state_dict()))
    algorithm, options = ARMS[request.node.callspec.params["model"]]
    other = make(algorithm, **{"action": "box", **options})
    other.policy.load_state_dict(copied)
    expected = model.predict(sample, deterministic=True)[0]
    np.testing.assert_array_equal(other.predict(sample, deterministic=True)[0], expected)
    other.set_parameters(model.get_parameters())
    np.testing.assert_array_equal(other.predict(sample, deterministic=True)[0], expected)


SAVED_BY_0_1 = {
    "trpo_0_1": (TRPO, "box"),
    "ppo_penalty_0_1": (PPOPenalty, "multibinary"),
    "recurrent_trpo_0_1": (RecurrentTRPO, "discrete"),
}


@pytest.mark.parametrize("name", SAVED_BY_0_1)
def test_models_that_version_0_1_saved_go_on(name: str) -> None:
    algorithm, action = SAVED_BY_0_1[name]
    model = algorithm.load(Path(__file__).parent.parent / "data" / name, env=make(algorithm, action).env, device="cpu")
    before = [param.detach().clone() for param in model.policy.parameters()]
    assert model.fast_updates is True  # of which that version did not know
    model.learn(64, reset_num_timesteps=False)
    assert model.update_path == ("autograd: a policy with memory" if "recurrent" in name else "fast")
    assert model.num_timesteps == 128
    assert any(not torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    if name == "trpo_0_1":
        assert model.value_critic.n_iterations == 3 and model.target_kl(1.0) == pytest.approx(0.02)
    if name == "recurrent_trpo_0_1":
        assert not hasattr(model, "n_epochs") and not hasattr(model, "clip_range")


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("algorithm", [TRPO, NPG, PPOClip, PPOPenalty])
def test_fast_updates_are_saved(algorithm: Any, fast: bool, tmp_path: Path) -> None:
    make(algorithm, "box", fast_updates=fast).learn(32).save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=make(algorithm, "box").env, device="cpu")
    assert loaded.fast_updates is fast
    assert loaded.learn(32).update_path == ("fast" if fast else "autograd: fast_updates=False")
    other = algorithm.load(tmp_path / "model", env=loaded.env, device="cpu", fast_updates=not fast).learn(32)
    assert other.update_path == ("autograd: fast_updates=False" if fast else "fast")


def numbers(model: Any) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("algorithm", [TRPO, NPG, PPOClip, PPOPenalty])
def test_a_copy_of_a_model_trains_on_its_own(algorithm: Any, fast: bool) -> None:
    model = make(algorithm, "box", fast_updates=fast).learn(32)
    twin = copy.deepcopy(model)
    before = numbers(model)
    for each in (twin, model):
        other = numbers(model if each is twin else twin)
        each.set_random_seed(7)
        each._last_obs = None
        each.learn(64, reset_num_timesteps=False)
        assert torch.equal(numbers(model if each is twin else twin), other)
        assert each.update_path == ("fast" if fast else "autograd: fast_updates=False")
    assert not torch.equal(numbers(twin), before)
    assert torch.equal(numbers(twin), numbers(model))
