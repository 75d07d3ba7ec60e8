import warnings
from typing import Any

import pytest
from envs import RandomEnv, make
from gymnasium import spaces
from stable_baselines3 import PPO

from sb3_trpo_ext import NPG, TRPO, PPOClip, PPOPenalty

NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_kl", 0),
        ("target_kl", -0.01),
        ("target_kl", None),
        ("target_kl", NAN),
        ("target_kl", "0.01"),
        ("target_kl", float("inf")),
        ("cg_max_steps", 0),
        ("cg_damping", -0.1),
        ("cg_damping", NAN),
        ("cg_residual_tol", -1),
        ("sub_sampling_factor", 0),
        ("sub_sampling_factor", 33),
        ("line_search_shrinking_factor", 1.0),
        ("line_search_shrinking_factor", 0.0),
        ("line_search_max_iter", 0),
        ("line_search_accept_ratio", 1.0),
        ("line_search_accept_ratio", -0.1),
        ("fisher_chunk_size", 0),
        ("fisher_chunk_size", "all"),
        ("curvature_samples", 0),
        ("critic", "sgd"),
        ("n_critic_updates", 0),
        ("batch_size", 0),
        ("ent_coef", NAN),
    ],
)
def test_an_impossible_argument_is_named_with_its_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as error:
        make(TRPO, **{name: value})
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cg_max_steps", None),
        ("cg_max_steps", 2.5),
        ("cg_damping", None),
        ("cg_damping", float("inf")),
        ("sub_sampling_factor", 1.5),
        ("line_search_max_iter", 2.5),
        ("line_search_shrinking_factor", None),
        ("fisher_chunk_size", 2.5),
        ("curvature_samples", 2.5),
        ("n_critic_updates", 1.5),
        ("batch_size", None),
        ("ent_coef", None),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named_at_construction(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"{name}.*{value}"):
        make(TRPO, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("n_epochs", 0), ("clip_range", -0.2), ("target_kl", 0), ("max_kl", 0), ("max_kl", NAN)]
)
def test_ppo_refuses_too(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        make(PPOClip, **{name: value})


@pytest.mark.parametrize("arguments", [{"batch_size": 1}, {"clip_range_vf": -1.0}, {"n_steps": 1}], ids=str)
def test_ppo_refuses_as_sb3_does(arguments: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        make(PPO, **arguments)
    with pytest.raises(AssertionError, match=next(iter(arguments))):
        make(PPOClip, **arguments)


def test_a_penalty_on_entropy_is_allowed() -> None:
    make(TRPO, ent_coef=-0.01)


@pytest.mark.parametrize("name", ["n_epochs", "batch_size"])
def test_ppo_refuses_a_fraction_of_an_epoch(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*1\.5"):
        make(PPOClip, **{name: 1.5})


def test_one_sample_cannot_be_normalised() -> None:
    with pytest.raises(AssertionError, match="n_steps=1"):
        make(TRPO, n_steps=1)
    make(TRPO, n_steps=1, normalize_advantage=False)


@pytest.mark.parametrize("algorithm", [TRPO, PPOClip])
def test_a_truncated_minibatch_is_warned_of(algorithm: Any) -> None:
    options = {"critic": "adam"} if algorithm is TRPO else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(algorithm, batch_size=16, **options)
        with pytest.raises(UserWarning, match="mini-batch size of 31"):
            make(algorithm, batch_size=31, **options)


@pytest.mark.parametrize("name", ["clip_range", "n_epochs", "vf_coef", "max_grad_norm", "clip_range_vf", "max_kl"])
def test_ppos_arguments_are_answered_with_ours(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}.*(target_kl|critic|PPOClip)"):
        make(TRPO, **{name: 0.2})


def test_a_misspelt_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="target_lk"):
        make(TRPO, target_lk=0.01)


def test_what_the_critic_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match=r"critic_kwargs.*learning_rate"):
        make(TRPO, critic="adam", critic_kwargs={"damping": 1.0})
    with pytest.raises(ValueError, match=r"critic_kwargs.*speed"):
        make(TRPO, critic="gauss_newton", critic_kwargs={"speed": 1.0})


@pytest.mark.parametrize("algorithm", [TRPO, PPOPenalty])
def test_a_radius_that_falls_to_zero_is_refused_at_construction(algorithm: Any) -> None:
    with pytest.raises(ValueError, match=r"`target_kl`.*got 0\.0.*schedule.*0\.03 \* max\(progress, 0\.01\)"):
        make(algorithm, target_kl=lambda progress: 0.03 * progress)


def test_a_fixed_step_may_fall_to_zero() -> None:
    model = make(NPG, step_size=lambda progress: 0.03 * progress)
    model.learn(model.n_steps + 1)  # the second rollout goes beyond the end


def test_a_schedule_is_not_asked_beyond_the_end_of_training() -> None:
    asked: list[float] = []

    def radius(progress: float) -> float:
        asked.append(progress)
        return 0.01 * progress + 1e-6

    model = make(TRPO, target_kl=radius)
    model.learn(model.n_steps + 1)  # the second rollout goes beyond
    assert min(asked) == 0.0


def test_other_action_spaces_are_refused() -> None:
    space = spaces.Dict({"a": spaces.Discrete(2)})
    with pytest.raises(AssertionError, match="Dict"):
        TRPO("MlpPolicy", RandomEnv(action_space=space))


@pytest.mark.parametrize("value", ["yes", None, 2, "exact"])
@pytest.mark.parametrize("algorithm", [TRPO, NPG, PPOClip, PPOPenalty])
def test_fast_updates_are_on_or_off(algorithm: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="`fast_updates` must be True or False") as error:
        make(algorithm, fast_updates=value)
    assert repr(value) in str(error.value)
