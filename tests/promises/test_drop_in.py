import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
from envs import OBSERVATION_SPACES, RandomEnv, make, policy_name
from stable_baselines3 import PPO
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule

import sb3_trpo_ext
from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, PPOClip, PPOPenalty, RecurrentNPG, RecurrentPPOClip, RecurrentTRPO
from sb3_trpo_ext.critic.adam import AdamCritic
from sb3_trpo_ext.critic.gauss_newton import GaussNewtonCritic
from sb3_trpo_ext.training.natural_gradient import ADAM_DEFAULTS, NaturalGradientAlgorithm

PAIRS = [(TRPO, sb3_contrib.TRPO), (PPOClip, stable_baselines3.PPO)]
OUR_LOG_KEYS = {
    "train/kl_max",
    "train/entropy",
    "train/step_fraction",
    "train/step_size",
    "train/expected_improvement",
    "train/improvement",
    "train/cg_steps",
    "train/cg_residual",
    "train/target_kl",
    "time/policy_s",
    "time/critic_s",
}


def logged(model: Any) -> set[str]:
    """Keys recorded since the last dump: those of the last update."""
    return set(model.learn(64).logger.name_to_value)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_the_arguments_are_theirs_then_ours_by_keyword(ours: Any, theirs: Any) -> None:
    mine = list(inspect.signature(ours).parameters.values())
    peers = list(inspect.signature(theirs).parameters.values())
    assert [(p.name, p.default, p.kind) for p in mine[: len(peers)]] == [(p.name, p.default, p.kind) for p in peers]
    assert {p.kind for p in mine[len(peers) :]} <= {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_learn_takes_the_same_arguments(ours: Any, theirs: Any) -> None:
    mine, peers = (list(inspect.signature(c.learn).parameters.values())[1:] for c in (ours, theirs))
    of_the_class = {"TRPO": None, "PPO": None}
    same, more = mine[: len(peers)], mine[len(peers) :]
    assert [(p.name, p.default) for p in same] == [(p.name, of_the_class.get(p.default, p.default)) for p in peers]
    assert {p.kind for p in more[:-1]} <= {inspect.Parameter.KEYWORD_ONLY}
    assert more[-1].kind is inspect.Parameter.VAR_KEYWORD
    with pytest.raises(TypeError, match="total"):
        make(ours).learn(32, total=32)


def test_tensorboard_calls_a_run_by_its_class(tmp_path: Any) -> None:
    for algorithm, name in ((TRPO, None), (PPOClip, None), (TRPO, "mine")):
        make(algorithm, tensorboard_log=str(tmp_path)).learn(32, tb_log_name=name)
    assert {path.name for path in tmp_path.iterdir()} == {"TRPO_1", "PPOClip_1", "mine_1"}


def test_the_log_has_their_keys_and_ours() -> None:
    theirs = logged(make(sb3_contrib.TRPO, "box"))
    assert logged(make(TRPO, "box")) == theirs | OUR_LOG_KEYS
    ppo = logged(make(stable_baselines3.PPO, "box", batch_size=16))
    assert logged(make(PPOClip, "box", batch_size=16)) >= ppo | {"train/kl_divergence_loss", "train/kl_max"}


@pytest.mark.parametrize(
    ("action", "observation", "gsde"),
    [
        ("box", "vector", False),
        ("discrete", "vector", False),
        ("box", "vector", True),
        ("multidiscrete", "dict", False),
    ],
)
def test_their_saved_models_load_and_go_on_training(action: str, observation: str, gsde: bool, tmp_path: Path) -> None:
    theirs = make(sb3_contrib.TRPO, action, observation, use_sde=gsde, target_kl=0.02).learn(64)
    theirs.save(tmp_path / "model")
    ours = TRPO.load(tmp_path / "model.zip", env=theirs.env, device="cpu")
    space = OBSERVATION_SPACES[observation]
    space.seed(0)
    for _ in range(5):
        sample = space.sample()
        expected, _ = theirs.predict(sample, deterministic=True)
        np.testing.assert_array_equal(ours.predict(sample, deterministic=True)[0], expected)
    assert (ours.num_timesteps, ours._n_updates) == (64, 2)
    ours.learn(64, reset_num_timesteps=False)
    assert (ours.num_timesteps, ours._n_updates) == (128, 4)
    assert ours.logger.name_to_value["train/target_kl"] == pytest.approx(0.02 * (3 if action == "box" else 1))


@pytest.mark.parametrize(
    ("action", "per_dimension", "radius"),
    [
        ("box", True, 0.03),
        ("box2d", True, 0.04),
        ("multibinary", True, 0.03),
        ("discrete", True, 0.01),
        ("multidiscrete", True, 0.01),
        ("box", False, 0.01),
        ("multibinary", False, 0.01),
    ],
)
def test_the_joint_radius_is_logged(action: str, per_dimension: bool, radius: float) -> None:
    model = make(TRPO, action, kl_per_action_dim=per_dimension).learn(32)
    assert model.logger.name_to_value["train/target_kl"] == pytest.approx(radius)
    assert 0 < model.logger.name_to_value["train/kl_divergence_loss"] <= radius


@pytest.mark.parametrize("radius", [LinearSchedule(0.04, 0.08, 1.0), lambda progress: 0.08 - 0.04 * progress])
def test_schedules_are_followed_at_every_update(radius: Any) -> None:
    model = make(TRPO, "discrete", target_kl=radius, learning_rate=lambda progress: 0.001 * progress, critic="adam")
    train, rows = model.train, []

    def observed() -> None:
        train()
        log, rate = model.logger.name_to_value, model.policy.optimizer.param_groups[0]["lr"]
        rows.append((log["train/target_kl"], log["train/learning_rate"], rate))

    model.train = observed
    model.learn(128)
    np.testing.assert_allclose(rows, [(0.08 - 0.04 * p, 0.001 * p, 0.001 * p) for p in (0.75, 0.5, 0.25, 0.0)])


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, GaussNewtonCritic),
        ({"learning_rate": 1e-3, "batch_size": 128, "n_critic_updates": 10}, GaussNewtonCritic),
        ({"learning_rate": 3e-4}, AdamCritic),
        ({"learning_rate": lambda progress: 1e-3 * progress}, AdamCritic),
        ({"batch_size": 64}, AdamCritic),
        ({"n_critic_updates": 20}, AdamCritic),
        ({"n_critic_updates": 20, "critic": "gauss_newton"}, GaussNewtonCritic),
        ({"critic": "adam"}, AdamCritic),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value) or "defaults",
)
def test_what_was_tuned_for_contribs_critic_keeps_its_meaning(
    options: dict[str, Any], kind: type, tmp_path: Any
) -> None:
    model = make(TRPO, **options)
    assert type(model.value_critic) is kind
    model.save(tmp_path / "model")
    assert type(TRPO.load(tmp_path / "model", device="cpu").value_critic) is kind


@pytest.mark.parametrize("algorithm", [NPG, RecurrentNPG, RecurrentTRPO, MaskableTRPO])
def test_trpos_defaults_are_those_of_the_other_natural_gradient_methods(algorithm: Any) -> None:
    """By what a model becomes without arguments, wherever in its classes a default stands."""
    policy = policy_name(algorithm, "vector")
    trpo, other = TRPO("MlpPolicy", RandomEnv(), device="cpu"), algorithm(policy, RandomEnv(), device="cpu")
    arguments = {*inspect.signature(TRPO).parameters, *inspect.signature(NaturalGradientAlgorithm).parameters}
    names = (arguments & set(vars(trpo)) & set(vars(other))) - {"policy", "env", "rollout_buffer_class"}
    assert len(names) > 25

    def comparable(value: Any) -> Any:
        return value(0.5) if isinstance(value, FloatSchedule) else value

    ours, theirs = ({name: comparable(vars(model)[name]) for name in names} for model in (trpo, other))
    assert ours == theirs


def test_the_adam_critics_defaults_are_contribs() -> None:
    signature = inspect.signature(sb3_contrib.TRPO).parameters
    assert {name: signature[name].default for name in ADAM_DEFAULTS} == ADAM_DEFAULTS


# Mistakes are answered as SB3 and sb3-contrib answer them: the same kind, findable by the same words


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
