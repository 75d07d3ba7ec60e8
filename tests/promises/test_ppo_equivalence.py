import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, OBSERVATION_SPACES, POLICIES, NoisyExtractor, RandomEnv, make, with_rollout
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from torch.distributions import kl_divergence

from sb3_trpo_ext import PPOClip
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.rollout.buffers import whole_rollout
from sb3_trpo_ext.training import first_order


def batch_of(model: Any) -> Batch:
    return whole_rollout(model.rollout_buffer, model.action_space)


def trained(algorithm: Any, action: str, observation: str, options: dict[str, Any]) -> Any:
    """Three updates with one seed, from construction on."""
    env = make_vec_env(lambda: RandomEnv(OBSERVATION_SPACES[observation], ACTION_SPACES[action]), n_envs=2, seed=0)
    arguments = {"n_steps": 24, "batch_size": 16, "n_epochs": 3, "seed": 0, "device": "cpu", **options}
    return algorithm(POLICIES.get(observation, "MlpPolicy"), env, **arguments).learn(3 * 48)


def check_equal(action: str, observation: str = "vector", **options: Any) -> None:
    theirs = trained(PPO, action, observation, options)
    for fast in (False, True):
        ours = trained(PPOClip, action, observation, {"fast_rollouts": False, "fast_updates": fast, **options})
        is_exact = ours.update_path != "fast"
        for mine, peer in zip(ours.policy.state_dict().values(), theirs.policy.state_dict().values(), strict=True):
            assert torch.equal(mine, peer) if is_exact else torch.allclose(mine, peer, rtol=1e-6, atol=1e-6)
        assert ours._n_updates == theirs._n_updates
        for key, value in theirs.logger.name_to_value.items():  # of which SB3 averages some in float32
            tolerance = {"rel": 1e-6} if is_exact else {"rel": 1e-4, "abs": 1e-6}
            assert ours.logger.name_to_value[key] == pytest.approx(float(value), **tolerance, nan_ok=True), key


@pytest.mark.parametrize("observation", ["vector", "dict"])
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_every_action_space(action: str, observation: str) -> None:
    check_equal(action, observation)


@pytest.mark.parametrize(
    "options",
    [
        {"use_sde": True, "sde_sample_freq": 4},
        {"use_sde": True, "policy_kwargs": {"squash_output": True}, "ent_coef": 0.01},
        {"clip_range_vf": 0.1},
        {"clip_range": lambda p: 0.1 + 0.2 * p, "learning_rate": lambda p: 1e-3 * p},
        {"target_kl": 1e-4},
        {"normalize_advantage": False, "ent_coef": 0.1, "vf_coef": 1.0, "max_grad_norm": 0.1},
        {"policy_kwargs": {"features_extractor_class": NoisyExtractor}},
        {"batch_size": 47},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_option(options: dict[str, Any]) -> None:
    check_equal("box", **options)


def test_a_wide_ball_changes_nothing() -> None:
    unbounded = trained(PPOClip, "box", "vector", {})
    bounded = trained(PPOClip, "box", "vector", {"max_kl": 1e9})
    for mine, peer in zip(bounded.policy.parameters(), unbounded.policy.parameters(), strict=True):
        assert torch.equal(mine, peer)


def test_a_later_epoch_that_leaves_the_ball_is_undone_alone() -> None:
    options = {"batch_size": 16, "learning_rate": 1e-3}
    one_epoch = make(PPOClip, "box", n_epochs=1, **options).learn(32)
    radius = one_epoch.logger.name_to_value["train/kl_divergence_loss"] * 1.01
    bounded = make(PPOClip, "box", n_epochs=10, max_kl=radius, **options).learn(32)
    assert bounded._n_updates == 1
    for mine, peer in zip(bounded.policy.parameters(), one_epoch.policy.parameters(), strict=True):
        assert torch.equal(mine, peer)
    moments, theirs = (m.policy.optimizer.state_dict()["state"] for m in (bounded, one_epoch))
    assert all(torch.equal(moments[i][key], value) for i in theirs for key, value in theirs[i].items())


def test_an_epoch_that_leaves_the_ball_is_undone() -> None:
    model = with_rollout(make(PPOClip, "box", batch_size=16, max_kl=1e-12, learning_rate=1e-2))
    before = [param.detach().clone() for param in model.policy.parameters()]
    model.train()
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    assert not model.policy.optimizer.state
    assert model._n_updates == 0
    assert model.logger.name_to_value["train/kl_divergence_loss"] == 0


@pytest.mark.parametrize("max_kl", [1e-4, 1e-3, 1e-2])
def test_the_exact_kl_stays_in_the_ball(max_kl: float) -> None:
    model = with_rollout(make(PPOClip, "box", batch_size=16, max_kl=max_kl, learning_rate=1e-3))
    states = torch.as_tensor(model.rollout_buffer.observations).flatten(0, 1)
    old = copy.deepcopy(model.policy).get_distribution(states).distribution
    model.train()
    with torch.no_grad():
        exact = kl_divergence(old, model.policy.get_distribution(states).distribution).sum(dim=1).mean()
    assert model.logger.name_to_value["train/kl_divergence_loss"] == pytest.approx(float(exact), rel=1e-3, abs=1e-7)
    assert exact <= max_kl * (1 + 1e-5)


@pytest.mark.parametrize("observation", ["vector", "dict"])
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_the_exact_kl_is_the_same_whether_coordinates_or_parameters_of_the_old_policy_are_kept(
    action: str, observation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together with everything else, in an epoch that is rolled back, too."""
    for options in ({}, {"max_kl": 1e9}, {"max_kl": 1e-9}, {"policy_kwargs": {"net_arch": [300, 300]}}):
        logs, ends = [], []
        for largest in (first_order.OLD_Z_BYTES, 0):
            monkeypatch.setattr(first_order, "OLD_Z_BYTES", largest)
            model = with_rollout(make(PPOClip, action, observation, batch_size=8, n_epochs=2, **options))
            assert isinstance(model._comparison(batch_of(model)), first_order.Comparison) == bool(largest)
            monkeypatch.setattr(first_order, "KL_CHUNK_SIZE", 32 if largest else 8)
            np.random.seed(0)
            torch.manual_seed(0)
            model.train()
            logs.append({k: v for k, v in model.logger.name_to_value.items() if "time/" not in k})
            ends.append([param.detach().clone() for param in model.policy.state_dict().values()])
            assert not model._reported_rejections or options == {"max_kl": 1e-9}
        assert logs[0] == pytest.approx(logs[1], rel=1e-3, abs=1e-6, nan_ok=True)
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
        monkeypatch.undo()


def test_a_policy_that_is_not_finite_has_no_finite_kl_by_either_way() -> None:
    model = with_rollout(make(PPOClip, "box", batch_size=8))
    problem = first_order.RecomputedComparison(model.policy, batch_of(model), 8)
    assert problem.evaluate().divergence == problem.evaluate().kl_max == 0
    model.policy.log_std.data[:] = math.inf
    found = problem.evaluate()
    assert not math.isfinite(found.divergence)
    assert not math.isfinite(found.kl_max)


def test_chunks_follow_what_a_sample_costs() -> None:
    sizes = []
    for width in (8, 4096):
        options: dict[str, Any] = {"batch_size": 8, "policy_kwargs": {"net_arch": [width]}}
        model = with_rollout(make(PPOClip, n_steps=256, **options))
        sizes.append(model._comparison(batch_of(model))._chunk_size)
    assert sizes[0] == first_order.KL_CHUNK_SIZE
    assert 8 <= sizes[1] < 256
