"""How much of the trust region a step uses: beside damping, and where the largest KL is bounded."""

from typing import Any

import numpy as np
import pytest
import torch
from envs import OBSERVATION_SPACES, RandomEnv, make, with_rollout
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, RecurrentNPG, RecurrentTRPO
from sb3_trpo_ext.core.natural_step import boundary_curvature

HALF = 0.5

action_spaces = st.one_of(
    st.integers(2, 5000).map(spaces.Discrete),
    st.lists(st.integers(2, 300), min_size=1, max_size=6).map(spaces.MultiDiscrete),
    st.integers(1, 60).map(spaces.MultiBinary),
    st.integers(1, 50).map(lambda size: spaces.Box(-1, 1, (size,))),
)


def updated(space: spaces.Space, algorithm: Any = TRPO, spread: float = 0.0, seed: int = 0, **options: Any) -> Any:
    """A model after one update from a policy whose weights were moved at random."""
    policy = "MlpLstmPolicy" if algorithm in (RecurrentTRPO, RecurrentNPG) else "MlpPolicy"
    env = RandomEnv(OBSERVATION_SPACES["vector"], space)
    model = algorithm(policy, env, n_steps=256, seed=seed, device="cpu", **options)
    with torch.no_grad():
        for param in model.policy.action_net.parameters():
            param.add_(spread * torch.randn_like(param))
    with_rollout(model)
    np.random.seed(0)
    model.train()
    return model


def radius_used(model: Any) -> float:
    log = model.logger.name_to_value
    return float(log["train/kl_divergence_loss"] / log["train/target_kl"])


@settings(max_examples=60, deadline=None)
@given(space=action_spaces, spread=st.sampled_from([0.0, 0.1, 0.5]), seed=st.integers(0, 99))
def test_at_least_half_of_the_radius_is_used_for_every_number_of_actions(
    space: spaces.Space, spread: float, seed: int
) -> None:
    options = {"min_radius_used": 0.6} if isinstance(space, spaces.Box) else {}
    model = updated(space, spread=spread, seed=seed, **options)
    assert model.logger.name_to_value["train/is_line_search_success"]
    if model.logger.name_to_value["train/step_fraction"] == 1:  # otherwise it was the line search that shortened it
        assert HALF <= radius_used(model) <= 1


@pytest.mark.parametrize("algorithm", [TRPO, NPG, MaskableTRPO, RecurrentTRPO, RecurrentNPG])
def test_every_method_has_it(algorithm: Any) -> None:
    model = updated(spaces.Discrete(500), algorithm)
    assert radius_used(model) > HALF
    assert radius_used(updated(spaces.Discrete(500), algorithm, min_radius_used=0.0)) < 0.1


def test_no_damping_is_too_strong() -> None:
    assert HALF < radius_used(updated(spaces.Discrete(1000), cg_damping=1e4)) < 0.8


def test_the_direction_stays_and_where_damping_leaves_enough_the_step_too() -> None:
    for share, same in ((0.3, True), (0.9, False)):
        ours, plain = (
            torch.nn.utils.parameters_to_vector(updated(spaces.Discrete(3), min_radius_used=u).policy.parameters())
            for u in (share, 0.0)
        )
        assert torch.equal(ours, plain) == same
    start, short, long = (
        torch.nn.utils.parameters_to_vector(
            updated(spaces.Discrete(100), min_radius_used=u, target_kl=kl).policy.action_net.parameters()
        )
        for u, kl in ((0.0, 1e-12), (0.0, 1e-3), (0.6, 1e-3))
    )
    cosine = torch.nn.functional.cosine_similarity(short - start, long - start, dim=0).detach()
    assert float(cosine) == pytest.approx(1.0, abs=1e-4)
    assert (long - start).norm() > 2 * (short - start).norm()


def test_box_keeps_the_steps_of_sb3_contrib_unless_asked() -> None:
    ours, plain = (
        torch.nn.utils.parameters_to_vector(updated(spaces.Box(-1, 1, (17,)), **options).policy.parameters())
        for options in ({}, {"min_radius_used": 0.0})
    )
    assert torch.equal(ours, plain)


def test_the_curvature_of_the_boundary() -> None:
    assert boundary_curvature(2.0, 0.5, 0.0) == 2.0
    assert boundary_curvature(2.0, 0.5, 0.25) == 2.0
    assert boundary_curvature(2.0, 0.5, 0.5) == 1.0
    assert boundary_curvature(2.0, 0.5, 1.0) == 0.5
    assert boundary_curvature(2.0, 0.0, 0.5) == 2.0  # no direction of F at all: damping bounds the step


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "all", None, True])
@pytest.mark.parametrize("algorithm", [TRPO, NPG, MaskableTRPO, RecurrentTRPO])
def test_an_impossible_share_is_named(algorithm: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"min_radius_used.*{value}"):
        make(algorithm, min_radius_used=value)


@settings(max_examples=20, deadline=None)
@given(space=st.sampled_from([spaces.Discrete(4), spaces.Box(-1, 1, (3,)), spaces.MultiBinary(3)]), data=st.data())
def test_a_bound_on_the_largest_kl_is_met_at_the_first_trial(space: spaces.Space, data: st.DataObject) -> None:
    seed, kl = data.draw(st.integers(0, 999)), data.draw(st.sampled_from([1e-4, 1e-3, 1e-2]))
    log = updated(space, seed=seed, target_kl=kl, trust_region="max").logger.name_to_value
    assert log["train/step_fraction"] == 1
    assert 0.85 < log["train/kl_max"] / log["train/target_kl"] <= 1
