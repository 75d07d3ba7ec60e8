"""A message blames what is at fault, and recommends what the class at hand has."""

import inspect
import math
import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from envs import OBSERVATION_SPACES, RandomEnv, make, with_rollout
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_trpo_ext import (
    NPG,
    TRPO,
    Family,
    MaskableTRPO,
    PPOClip,
    PPOPenalty,
    RecurrentNPG,
    RecurrentPPOClip,
    RecurrentTRPO,
    register_distribution,
)
from sb3_trpo_ext.policy import distributions
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


@pytest.mark.parametrize(
    ("algorithm", "options"), FORMS, ids=["-".join([kind.__name__, *options]) for kind, options in FORMS]
)
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


# Updates that come to nothing are counted once, for their own reason; what cannot work is named when it is met


EVERY = [TRPO, NPG, PPOClip, PPOPenalty, RecurrentTRPO, RecurrentNPG, RecurrentPPOClip, MaskableTRPO]
NATURAL = [TRPO, NPG, RecurrentTRPO, RecurrentNPG, MaskableTRPO]


class Scaled(RandomEnv):
    """Rewards of any size."""

    def __init__(self, scale: float) -> None:
        super().__init__(OBSERVATION_SPACES["vector"], spaces.Discrete(3))
        self._scale = scale

    def step(self, action: Any) -> Any:
        observation, _, *rest = super().step(action)
        return observation, self._scale * float(action), *rest


# Counting


@pytest.mark.parametrize("algorithm", NATURAL)
def test_updates_that_the_critic_brings_down_are_counted(algorithm: Any) -> None:
    model = make(algorithm, critic="adam", learning_rate=1e38)
    with pytest.warns(UserWarning, match=r"10 updates in a row.*"):
        model.learn(32 * (REJECTIONS_BEFORE_WARNING + 1))


@pytest.mark.parametrize("algorithm", [TRPO, NPG, PPOClip, PPOPenalty])
@pytest.mark.parametrize("normalized", [True, False])
def test_each_update_counts_once(algorithm: Any, normalized: bool) -> None:
    model = algorithm(
        "MlpPolicy", Scaled(1e20), n_steps=32, gamma=0.5, device="cpu", seed=0, normalize_advantage=normalized
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.learn(32 * 4)
    assert model._rejections_in_a_row == 4


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e18, 5e18])
def test_rewards_of_any_size_are_followed_or_not_for_their_own_reason(
    scale: float, capsys: pytest.CaptureFixture[str]
) -> None:
    model = TRPO("MlpPolicy", Scaled(scale), n_steps=32, gamma=0.5, device="cpu", seed=0, verbose=1).learn(32)
    assert "equal up to rounding" not in capsys.readouterr().out
    assert model.logger.name_to_value["train/is_line_search_success"] == 1


@pytest.mark.parametrize("algorithm", EVERY)
def test_a_policy_without_anything_to_train_says_so(algorithm: Any) -> None:
    model = make(algorithm)
    model.policy.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"no trainable parameter.*requires_grad"):
        model.learn(32 * (REJECTIONS_BEFORE_WARNING + 1))


# The largest KL divergence


def test_a_step_to_the_largest_kl_is_seldom_too_long() -> None:
    model = TRPO("MlpPolicy", "CartPole-v1", n_steps=512, trust_region="max", device="cpu", seed=3)
    fractions = []
    for _ in range(30):
        with_rollout(model).train()
        fractions.append(model.logger.name_to_value["train/step_fraction"])
    assert np.mean(np.array(fractions) == 1.0) > 0.95


# Sequences of different lengths keep their graphs


def test_sequences_of_two_lengths_are_run_no_oftener_than_of_one() -> None:
    calls = []
    for lengths in ((40, 40), (1, 40)):
        envs = DummyVecEnv([partial(RandomEnv, episode_length=length) for length in lengths])
        options = {"curvature_samples": None, "policy_kwargs": {"lstm_hidden_size": 8}, "seed": 0, "device": "cpu"}
        model = with_rollout(RecurrentTRPO("MlpLstmPolicy", envs, n_steps=40, **options))
        seen: list[int] = []
        for lstm in (model.policy.lstm_actor, model.policy.lstm_critic):
            lstm.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        model.train()
        calls.append(len(seen))
    assert calls[1] <= 2 * calls[0]


# Arguments


@pytest.mark.parametrize("number", [np.float32(0.01), np.float64(0.01), np.float32(1)])
def test_numbers_of_numpy_are_numbers(number: Any) -> None:
    for algorithm, name in (
        (TRPO, "target_kl"),
        (NPG, "target_kl"),
        (PPOPenalty, "target_kl"),
        (PPOClip, "clip_range"),
        (PPOClip, "clip_range_vf"),
        (TRPO, "learning_rate"),
        (PPOClip, "learning_rate"),
        (NPG, "step_size"),
        (TRPO, "ent_coef"),
    ):
        make(algorithm, **{name: number}).learn(32)


@pytest.mark.parametrize("made", [np.array, torch.tensor, np.float32])
def test_a_schedule_may_return_whatever_is_a_number(made: Any) -> None:
    for algorithm, name in (
        (TRPO, "target_kl"),
        (NPG, "step_size"),
        (PPOPenalty, "target_kl"),
        (PPOClip, "clip_range_vf"),
        (PPOClip, "target_kl"),
        (TRPO, "ent_coef"),
    ):
        make(algorithm, **{name: lambda progress: made(0.05)}).learn(32)


@pytest.mark.parametrize("algorithm", [TRPO, PPOClip])
def test_a_number_of_steps_of_another_type_is_not_the_same(algorithm: Any) -> None:
    model = make(algorithm).learn(32)
    model.n_steps = 32.0
    with pytest.raises(ValueError, match=r"`n_steps` must be an integer.*32\.0"):
        model.learn(32)


# The policy


@pytest.mark.parametrize("algorithm", [TRPO, NPG, PPOClip, PPOPenalty])
@pytest.mark.parametrize("fast", [True, "exact", False])
def test_an_action_that_overflows_is_named_with_its_place(algorithm: Any, fast: Any) -> None:
    model = make(algorithm, "box", fast_rollouts=fast)
    with torch.no_grad():
        model.policy.log_std.fill_(88.5)
    with pytest.raises(ValueError, match=r"action that is not finite.*environment 0 at step \d.*policy's own doing"):
        model.learn(640)


def replaced_policy(model: Any) -> None:
    model.policy = make(TRPO, seed=9).policy


def loaded_state(model: Any) -> None:
    model.policy.load_state_dict(make(TRPO, seed=9).policy.state_dict())


@pytest.mark.parametrize("change", [replaced_policy, loaded_state])
def test_what_was_remembered_of_another_policy_is_forgotten(change: Any) -> None:
    model = make(TRPO, momentum=0.9, sample_reuse=3).learn(96)
    assert len(model._past_rollouts) == 2 and model.gradient_memory is not None
    change(model)
    model.learn(32, reset_num_timesteps=False)
    assert len(model._past_rollouts) == 1
    assert model.logger.name_to_value["train/momentum"] == 0.0


@pytest.mark.parametrize("fast", [True, "exact"])
def test_masks_of_a_wrong_size_are_named(fast: Any) -> None:
    model = make(MaskableTRPO, fast_rollouts=fast)
    model.env.envs[0].unwrapped.action_masks = lambda: np.ones(5, dtype=bool)
    with pytest.raises(ValueError, match=r"`action_masks` must have one entry for each of the 4 options.*got 5"):
        model.learn(32)


# Families of a user's own


class Mine(DiagGaussianDistribution):
    """A Gaussian for which a family is registered anew in each test."""


class Right(Family):
    def coordinates(self, distribution: Any) -> Any:
        return torch.cat([distribution.distribution.loc, distribution.distribution.scale], dim=1)

    def kl(self, old: Any, new: Any) -> Any:
        return (old - new).square().sum(dim=1)


class ScalarKl(Right):
    def kl(self, old: Any, new: Any) -> Any:
        return (old - new).square().sum()


class FlatCoordinates(Right):
    def coordinates(self, distribution: Any) -> Any:
        return distribution.distribution.loc[:, 0]


class LinearKl(Right):
    def kl(self, old: Any, new: Any) -> Any:
        return (old - new).sum(dim=1)


class DetachedKl(Right):
    def kl(self, old: Any, new: Any) -> Any:
        return (old - new).square().sum(dim=1).detach()


@pytest.mark.parametrize(
    ("factory", "error", "words"),
    [
        (lambda _: 5, TypeError, r"factory registered for Mine must return a Family or None, got 5"),
        (lambda _: ScalarKl(), ValueError, r"ScalarKl\.kl must return one number for each of 2 states"),
        (lambda _: FlatCoordinates(), ValueError, r"FlatCoordinates\.coordinates must have the shape \(N, K\)"),
        (lambda _: LinearKl(), NotImplementedError, r"LinearKl\.kl is not differentiable twice"),
        (lambda _: DetachedKl(), NotImplementedError, r"DetachedKl\.kl is not differentiable twice"),
    ],
)
def test_a_family_that_is_wrong_is_diagnosed(
    factory: Any, error: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributions, "_FACTORIES", dict(distributions._FACTORIES))
    register_distribution(Mine, factory)
    model = make(TRPO, "box")
    model.policy.action_dist = Mine(3)
    before = [param.clone() for param in model.policy.parameters()]
    with pytest.raises(error, match=words):
        model.learn(32)
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))


def test_the_note_on_an_estimated_kl_is_made_for_every_class(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distributions, "_FACTORIES", dict(distributions._FACTORIES))
    monkeypatch.setattr(distributions, "family_of", lambda _: None)
    from sb3_trpo_ext.policy import problem as policy_problem

    monkeypatch.setattr(policy_problem, "family_of", lambda _: None)
    model = make(TRPO, "box", verbose=1).learn(96)
    printed = capsys.readouterr().out
    assert printed.count("KL divergence is estimated from the actions") == 1
    assert math.isfinite(model.logger.name_to_value["train/kl_divergence_loss"])
