import inspect
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import optuna
import pytest
from gymnasium import spaces
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo_ext.zoo import ALGORITHMS
from sb3_trpo_ext.zoo.samplers import DISCRETE_ACTIONS

Build = Callable[..., Any]


class Masked(gym.Env[Any, Any]):
    """Two actions, one forbidden; everything is worth one."""

    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.Discrete(2)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**kwargs)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action == 0, "the mask was not asked"
        return self.observation_space.sample(), 1.0, bool(self.np_random.random() < 0.2), False, {}

    def action_masks(self) -> np.ndarray:
        return np.array([True, False])


class PoisonedReward(Masked):
    """A reward that becomes NaN in half of the instances."""

    made = 0

    def __init__(self) -> None:
        PoisonedReward.made += 1
        self._poisoned = PoisonedReward.made <= 2

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(0)
        return observation, float("nan") if self._poisoned else reward, terminated, truncated, info


gym.register("Masked-v0", entry_point=Masked)
gym.register("PoisonedReward-v0", entry_point=PoisonedReward)


def sampled(
    algo: str, number: int, dimensions: int = 0, discrete: bool = False
) -> tuple[optuna.trial.FrozenTrial, dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=number))
    trial = study.ask()
    trial.set_user_attr(DISCRETE_ACTIONS, discrete)
    arguments = HYPERPARAMS_SAMPLER[algo](trial, dimensions, 4, {})
    return study.trials[0], arguments


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_what_is_sampled_makes_a_model(algo: str) -> None:
    env = make_vec_env("Masked-v0", n_envs=4)
    policy = "MlpLstmPolicy" if algo.endswith("_lstm") else "MlpPolicy"
    critics = set()
    for number in range(6):
        _, arguments = sampled(algo, number)
        model = ALGORITHMS[algo](policy, env, **arguments)
        critics.add(getattr(model, "critic", None))
    assert algo.startswith("ppo") or critics == {"gauss_newton", "adam"}


@pytest.mark.parametrize("algo", ["trpo", "npg", "ppo_penalty", "trpo_mask"])
def test_values_of_actions_are_sampled_where_they_can_be(algo: str) -> None:
    env, seen = make_vec_env("Masked-v0", n_envs=4), set()
    for number in range(12):
        trial, arguments = sampled(algo, number, discrete=True)
        model = ALGORITHMS[algo]("MlpPolicy", env, **arguments)
        assert model.has_action_values == trial.params["action_values"]
        if model.has_action_values:
            assert algo == "ppo_penalty" or model.critic_kwargs["fit"] == trial.params["critic"]
            seen.add((model.bootstrap, model.surrogate))
        assert "action_values" not in sampled(algo, number)[0].params
    assert {each[0] for each in seen} == {"expected", "max"} and {each[1] for each in seen} == {"sampled", "expected"}
    for recurrent in ("trpo_lstm", "npg_lstm"):
        assert "action_values" not in sampled(recurrent, 0, discrete=True)[0].params


@pytest.mark.parametrize("algo", [algo for algo in ALGORITHMS if algo != "trpo_mask"])
def test_what_is_sampled_for_continuous_actions_makes_a_model(algo: str) -> None:
    env = make_vec_env("Pendulum-v1", n_envs=4)
    policy = "MlpLstmPolicy" if algo.endswith("_lstm") else "MlpPolicy"
    chosen = set()
    for number in range(6):
        trial, arguments = sampled(algo, number, 1)
        model = ALGORITHMS[algo](policy, env, **arguments)
        if "log_std" in trial.params:
            chosen.add(model.log_std)
            assert float(model.policy.log_std) == pytest.approx(trial.params["log_std_init"])
    assert chosen == (set() if algo.startswith("ppo_clip") else {"learned", "fixed"})  # whose space is the zoo's own


@pytest.mark.parametrize(("dimensions", "discrete"), [(0, False), (0, True), (1, False)])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_stored_trial_is_converted_to_what_was_sampled(algo: str, dimensions: int, discrete: bool) -> None:
    for number in range(6):
        trial, arguments = sampled(algo, number, dimensions, discrete)
        assert HYPERPARAMS_CONVERTER[algo](trial.params) == arguments


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_space_is_the_same_in_every_trial(algo: str) -> None:
    for dimensions in (0, 1):
        assert len({frozenset(sampled(algo, number, dimensions)[0].distributions) for number in range(6)}) == 1


def test_a_long_minibatch_is_cut_to_the_rollout() -> None:
    study = optuna.create_study()
    study.enqueue_trial({"n_steps_pow": 7, "batch_size_pow": 10, "critic": "adam"})
    trial = study.ask()
    assert HYPERPARAMS_SAMPLER["trpo"](trial, 0, 4, {})["batch_size"] == 512 == 4 * 2**7
    assert trial.user_attrs["batch_size"] == 512


@pytest.mark.parametrize("algo", ["trpo", "npg", "trpo_lstm", "npg_lstm", "trpo_mask"])
def test_the_space_covers_what_matters(algo: str) -> None:
    names = set(sampled(algo, 0)[0].distributions)
    assert names >= {"target_kl", "cg_damping", "cg_max_steps", "critic", "one_minus_gamma", "one_minus_gae_lambda"}
    assert names >= {"n_steps_pow", "net_arch", "activation_fn"}


def test_a_user_reads_true_values() -> None:
    trial, arguments = sampled("trpo", 0)
    assert trial.user_attrs["gamma"] == arguments["gamma"]
    assert trial.user_attrs["n_steps"] == arguments["n_steps"]


def test_samplers_have_the_signature_of_the_zoo() -> None:
    zoo = inspect.signature(HYPERPARAMS_SAMPLER["a2c"])
    for algo in ALGORITHMS:
        assert list(inspect.signature(HYPERPARAMS_SAMPLER[algo]).parameters) == list(zoo.parameters)


STUDY = {"optimize_hyperparameters": True, "n_trials": 2, "n_timesteps": 200, "no_optim_plots": True}
SHORT = {"n_startup_trials": 1, "n_evaluations": 1, "pruner": "none", "n_eval_episodes": 1}


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_study_runs(experiment: Build, algo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from rl_zoo3 import exp_manager

    def small(*args: Any) -> dict[str, Any]:
        return sampler(*args) | {"n_steps": 32, "batch_size": 32}

    sampler = HYPERPARAMS_SAMPLER[algo]
    monkeypatch.setitem(exp_manager.HYPERPARAMS_SAMPLER, algo, small)
    env = "Masked-v0" if algo == "trpo_mask" else "CartPole-v1"
    manager = experiment(algo, env, **STUDY, **SHORT)
    assert manager.setup_experiment() is None
    manager.hyperparameters_optimization()


@pytest.mark.parametrize("use_sde", [False, True])
def test_a_study_of_continuous_actions_runs(experiment: Build, use_sde: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """gSDE has no σ to be chosen."""
    from rl_zoo3 import exp_manager

    def small(*args: Any) -> dict[str, Any]:
        found = sampler(*args) | {"n_steps": 32, "batch_size": 32}
        chosen.append("log_std" in found)
        return found

    chosen: list[bool] = []
    sampler = HYPERPARAMS_SAMPLER["trpo"]
    monkeypatch.setitem(exp_manager.HYPERPARAMS_SAMPLER, "trpo", small)
    hyperparams = {"n_envs": 1, "use_sde": use_sde}
    manager = experiment("trpo", "Pendulum-v1", hyperparams=hyperparams, **STUDY, **SHORT)
    manager.setup_experiment()
    manager.hyperparameters_optimization()
    assert chosen == [not use_sde] * 2


def test_a_trial_that_meets_nan_is_pruned_and_the_others_go_on(
    experiment: Build, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rl_zoo3 import exp_manager

    studies = []
    create = optuna.create_study
    monkeypatch.setattr(
        exp_manager.optuna, "create_study", lambda **kwargs: studies.append(create(**kwargs)) or studies[0]
    )
    hyperparams = {"n_envs": 1}
    manager = experiment("trpo", "PoisonedReward-v0", hyperparams=hyperparams, **STUDY, **SHORT)
    manager.setup_experiment()
    manager.hyperparameters_optimization()
    assert [trial.state.name for trial in studies[0].trials] == ["PRUNED", "COMPLETE"]
    assert "not finite" in capsys.readouterr().out


def test_hyperparameters_of_a_stored_trial_are_used(experiment: Build, tmp_path: Any) -> None:
    storage, name = f"sqlite:///{tmp_path}/study.db", "stored"
    study = optuna.create_study(storage=storage, study_name=name)
    for _ in range(2):
        trial = study.ask()
        HYPERPARAMS_SAMPLER["trpo"](trial, 0, 4, {})
        study.tell(trial, 1.0)
    model, saved = experiment("trpo", "CartPole-v1", storage=storage, study_name=name, trial_id=1).setup_experiment()
    params = study.trials[1].params
    assert model.cg_damping == params["cg_damping"]
    assert model.critic == params["critic"]
    assert saved["n_steps"] == 2 ** params["n_steps_pow"]
