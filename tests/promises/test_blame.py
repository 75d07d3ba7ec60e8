"""A message blames what is at fault, and recommends what the class at hand has."""

import inspect
import warnings
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from envs import make, with_rollout
from gymnasium import spaces

from sb3_trpo_ext import (
    NPG,
    TRPO,
    MaskableTRPO,
    PPOClip,
    PPOPenalty,
    RecurrentNPG,
    RecurrentPPOClip,
    RecurrentTRPO,
)
from sb3_trpo_ext.policy.signal import CURES
from sb3_trpo_ext.rollout.finite import check_policy
from sb3_trpo_ext.training.base import REJECTIONS_BEFORE_WARNING

ALGORITHMS = [TRPO, NPG, PPOClip, PPOPenalty, RecurrentTRPO, RecurrentNPG, RecurrentPPOClip, MaskableTRPO]
ENVIRONMENT = "VecCheckNan"


# The policy, not the environment


@pytest.mark.parametrize("algorithm", [kind for kind in ALGORITHMS if kind is not MaskableTRPO])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("log_std", [-1000.0, 100.0, float("inf"), float("-inf"), float("nan")])
def test_a_standard_deviation_is_named_with_its_parameter(algorithm: Any, fast: bool, log_std: float) -> None:
    model = make(algorithm, "box", fast_rollouts=fast)
    with torch.no_grad():
        model.policy.log_std[1] = log_std
    with pytest.raises(ValueError, match=r"log_std") as error:
        model.learn(64)
    assert ENVIRONMENT not in str(error.value)
    assert f"{log_std:g}" in str(error.value)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("fast", [True, "exact", False])
@pytest.mark.parametrize("name", ["action_net.weight", "value_net.bias"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("validates", [True, False])
def test_a_parameter_is_named(
    algorithm: Any, fast: bool, name: str, value: float, validates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", validates)  # torch.compile switches it off
    model = make(algorithm, fast_rollouts=fast)
    with torch.no_grad():
        model.policy.get_parameter(name).view(-1)[0] = value
    with pytest.raises(ValueError, match=rf"parameter `{name}`.*{value}") as error:
        model.learn(64)
    assert ENVIRONMENT not in str(error.value)


@pytest.mark.parametrize("fast", [True, False])
def test_so_is_one_that_a_callback_broke_within_a_rollout(fast: bool) -> None:
    model = make(TRPO, "box", fast_rollouts=fast)

    def break_it(scope: dict[str, Any], _: Any) -> bool:
        if model.num_timesteps == 40:
            with torch.no_grad():
                model.policy.log_std[0] = float("nan")
        return True

    with pytest.raises(ValueError, match=r"parameter `log_std`"):
        model.learn(64, callback=break_it)


def test_frozen_parameters_and_gsde_are_left_alone() -> None:
    model = make(TRPO, "box")
    model.policy.register_parameter("mask", torch.nn.Parameter(torch.tensor([float("-inf")]), requires_grad=False))
    model.policy.register_buffer("other", torch.tensor([float("-inf")]))
    check_policy(model.policy)
    for options, log_std, wrong in (
        ({}, -44.0, False),
        ({}, -60.0, True),  # the variance is zero in float32
        ({"use_sde": True}, -60.0, False),
        ({"use_sde": True}, -200.0, True),
        ({"use_sde": True, "policy_kwargs": {"use_expln": True}}, 50.0, False),
        ({"use_sde": True}, 100.0, True),
    ):
        model = make(TRPO, "box", **options)
        with torch.no_grad():
            model.policy.log_std.fill_(log_std)
        with pytest.raises(ValueError, match="log_std") if wrong else nullcontext():
            check_policy(model.policy)


@pytest.mark.parametrize("fast", [True, False])
def test_an_overflow_inside_the_policy_is_not_the_environments(fast: bool) -> None:
    model = make(TRPO, "box", fast_rollouts=fast)
    with torch.no_grad():
        model.policy.value_net.weight.fill_(3e38)
    with pytest.raises(ValueError, match=r"value that is not finite.*policy's own doing") as error:
        model.learn(64)
    assert ENVIRONMENT not in str(error.value)


def test_an_environment_that_is_at_fault_is_still_blamed() -> None:
    model = make(TRPO, "box")
    env = model.env.envs[0].unwrapped
    env.step = lambda action, step=env.step: (step(action)[0] * np.nan, *step(action)[1:])
    with pytest.raises(ValueError, match=rf"observation.*{ENVIRONMENT}"):
        model.learn(64)


# Cures


def arguments_of(algorithm: Any) -> set[str]:
    """What a user may pass."""
    found: set[str] = set()
    for kind in algorithm.__mro__:
        if kind.__module__.startswith("sb3_trpo_ext"):
            found |= set(inspect.signature(kind.__init__).parameters)
    return found - set(getattr(algorithm, "refused_arguments", {}))


def warned(model: Any, reason: str) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(REJECTIONS_BEFORE_WARNING):
            model._report_rejection(reason)
    (warning,) = caught
    return str(warning.message)


FORMS = [
    *((kind, {}) for kind in ALGORITHMS),
    (NPG, {"step_size": 0.1}),
    (RecurrentNPG, {"step_size": lambda progress: 0.1}),
    (TRPO, {"kl_penalty": 2.0}),
    (TRPO, {"kl_penalty": "theory"}),
    (PPOClip, {"max_kl": 0.01}),
    (PPOPenalty, {"max_kl": 0.01}),
]


@pytest.mark.parametrize(("algorithm", "options"), FORMS, ids=str)
def test_cures_are_arguments_of_the_class_and_in_force(algorithm: Any, options: dict[str, Any]) -> None:
    model = make(algorithm, **options)
    message = warned(model, "it was told to")
    named = set(message.split("`")[1::2])
    assert named <= arguments_of(algorithm)
    assert "n_steps" in named
    if "step_size" in options or "kl_penalty" in options:
        assert "target_kl" not in named
    for name in ("step_size", "kl_penalty", "max_kl"):
        assert (name in named) == (name in options)


@pytest.mark.parametrize("reason", CURES)
def test_where_there_is_nothing_to_follow_no_length_of_a_step_is_recommended(reason: str) -> None:
    message = warned(make(TRPO), reason)
    assert reason in message
    assert not {"target_kl", "cg_damping"} & set(message.split("`")[1::2])


def test_a_frozen_policy_says_so() -> None:
    model = make(TRPO, verbose=0)
    for param in model.policy.parameters():
        param.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"no trainable parameter.*requires_grad"):
        for _ in range(REJECTIONS_BEFORE_WARNING):
            with_rollout(model).train()


# Schedules

SCHEDULES = [
    *((kind, name) for kind in ALGORITHMS for name in ("learning_rate", "ent_coef")),
    *((kind, "target_kl") for kind in ALGORITHMS),
    *((kind, "step_size") for kind in (NPG, RecurrentNPG)),
    *((kind, name) for kind in (PPOClip, RecurrentPPOClip) for name in ("clip_range", "clip_range_vf")),
    (PPOPenalty, "clip_range_vf"),
]
SIGNED = {"ent_coef"}


@pytest.mark.parametrize(("algorithm", "name"), SCHEDULES)
@pytest.mark.parametrize("wrong", [-0.01, float("nan"), float("inf")])
@pytest.mark.parametrize("where", [(0.9, 1.0), (0.0, 0.1), (0.4, 0.6)])
def test_a_schedule_that_goes_wrong_is_refused_at_construction(
    algorithm: Any, name: str, wrong: float, where: tuple[float, float]
) -> None:
    if name in SIGNED and wrong < 0:
        pytest.skip("may be negative")

    def schedule(progress: float) -> float:
        return wrong if where[0] <= progress <= where[1] else 0.01

    with pytest.raises(ValueError, match=rf"`{name}`.*{wrong}.*progress"):
        make(algorithm, **{name: schedule})


@pytest.mark.parametrize(("algorithm", "name"), SCHEDULES)
def test_a_schedule_that_falls_to_zero_is_fine_unless_it_is_a_radius(algorithm: Any, name: str) -> None:
    options: dict[str, Any] = {name: lambda progress: np.float32(0.01) * progress}
    if name == "target_kl" and not issubclass(algorithm, PPOClip):
        with pytest.raises(ValueError, match="stay positive"):
            make(algorithm, **options)
    else:
        make(algorithm, **options)


@pytest.mark.parametrize(("algorithm", "name"), SCHEDULES)
@pytest.mark.parametrize("wrong", [float("nan"), "big", lambda progress: "big"])
def test_what_is_no_number_is_refused_at_construction(algorithm: Any, name: str, wrong: Any) -> None:
    with pytest.raises((ValueError, AssertionError), match=f"`{name}`"):
        make(algorithm, **{name: wrong})


def test_a_schedule_of_the_bonus_may_return_what_sb3_can_read() -> None:
    make(TRPO, ent_coef=lambda progress: torch.tensor(0.01)).learn(32)


def test_a_discrete_policy_has_no_standard_deviation() -> None:
    model = make(TRPO)
    assert isinstance(model.action_space, spaces.Discrete)
    check_policy(model.policy)
