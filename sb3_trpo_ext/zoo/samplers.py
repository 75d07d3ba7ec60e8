"""Optuna search spaces of our algorithms, for ``trpo-zoo train --algo ... --optimize-hyperparameters``.

As everywhere in the RL Zoo, a sampler suggests numbers and hands them to a converter, which turns them into constructor
arguments; the converter alone turns the parameters of a stored trial (``--trial-id``) into arguments again. All
parameters of an algorithm are suggested in every trial, so that the zoo's multivariate TPE sampler sees a space that
stays the same; the converter drops what does not apply.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
from rl_zoo3.hyperparams_opt import convert_onpolicy_params, sample_ppo_lstm_params, sample_ppo_params

Params = dict[str, Any]

CRITIC_ARGUMENTS = {
    "gauss_newton": ("critic_damping", "critic_cg_steps"),
    "adam": ("learning_rate", "n_critic_updates", "batch_size_pow"),
}
"""What each kind of critic takes, by the names of the search space."""


DISCRETE_ACTIONS = "discrete_actions"
"""The attribute by which a trial knows that actions are Discrete, and may have a value each."""


def convert_action_values(sampled_params: Params) -> Params:
    """Arguments of the critic and the surrogate, where a trial chose between values of states and of actions."""
    params = sampled_params.copy()
    if "action_values" not in params:
        return params
    arguments = {name: params.pop(name) for name in ("bootstrap", "surrogate")}
    if params.pop("action_values"):
        params |= {**arguments, "critic": "action_value"}
        if "critic" in sampled_params:
            params["critic_kwargs"] = {"fit": sampled_params["critic"], **params.get("critic_kwargs", {})}
    return params


def suggest_action_values(trial: optuna.Trial) -> Params:
    """What `convert_action_values` converts, where there can be values of actions."""
    if not trial.user_attrs.get(DISCRETE_ACTIONS):
        return {}
    return {
        "action_values": trial.suggest_categorical("action_values", [False, True]),
        "bootstrap": trial.suggest_categorical("bootstrap", ["expected", "max"]),
        "surrogate": trial.suggest_categorical("surrogate", ["sampled", "expected"]),
    }


def convert_natural_gradient_params(sampled_params: Params) -> Params:
    """Constructor arguments of TRPO and NPG from the parameters of a trial."""
    params = sampled_params.copy()
    kind = params["critic"]
    unused = CRITIC_ARGUMENTS["adam" if kind == "gauss_newton" else "gauss_newton"]
    params = {name: value for name, value in params.items() if name not in unused}
    spread = spread_of(params)
    if kind == "gauss_newton":
        params["critic_kwargs"] = {"damping": params.pop("critic_damping"), "cg_steps": params.pop("critic_cg_steps")}
    return with_spread(convert_onpolicy_params(convert_action_values(params)), spread)


def convert_ppo_penalty_params(sampled_params: Params) -> Params:
    """Constructor arguments of PPOPenalty from the parameters of a trial."""
    params = convert_action_values(sampled_params)
    spread = spread_of(params)
    return with_spread(convert_onpolicy_params(params), spread)


def spread_of(params: Params) -> Params:
    """What a trial says of σ, taken out of its parameters; nothing where actions have none."""
    return {name: params.pop(name) for name in ("log_std", "log_std_init") if name in params}


def with_spread(arguments: Params, spread: Params) -> Params:
    """Constructor arguments with those of σ."""
    if spread:
        arguments["log_std"] = spread["log_std"]
        arguments.setdefault("policy_kwargs", {})["log_std_init"] = spread["log_std_init"]
    return arguments


def convert_recurrent_params(sampled_params: Params) -> Params:
    """As `convert_natural_gradient_params`, with the size of the LSTM."""
    params = sampled_params.copy()
    lstm = {name: params.pop(name) for name in ("lstm_hidden_size", "enable_critic_lstm")}
    converted = convert_natural_gradient_params(params)
    converted["policy_kwargs"].update(lstm)
    return converted


def sample_on_policy(trial: optuna.Trial, n_actions: int) -> Params:
    """What every algorithm has: rollout, discounting, network; and σ, where the zoo counts dimensions: Box."""
    one_minus_gamma = trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True)
    n_steps_pow = trial.suggest_int("n_steps_pow", 7, 12)
    trial.set_user_attr("gamma", 1 - one_minus_gamma)
    trial.set_user_attr("n_steps", 2**n_steps_pow)
    return {
        "n_steps_pow": n_steps_pow,
        "one_minus_gamma": one_minus_gamma,
        "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 0.0001, 0.1, log=True),
        "net_arch": trial.suggest_categorical("net_arch", ["tiny", "small", "medium"]),
        "activation_fn": trial.suggest_categorical("activation_fn", ["tanh", "relu"]),
        **(suggest_spread(trial) if n_actions else {}),
    }


def suggest_spread(trial: optuna.Trial) -> Params:
    """Where log σ begins, and whether it is learnt from there or stays."""
    return {
        "log_std": trial.suggest_categorical("log_std", ["learned", "fixed"]),
        "log_std_init": trial.suggest_float("log_std_init", -2.0, 0.0),
    }


def suggest_natural_gradient(trial: optuna.Trial, n_actions: int, n_envs: int) -> Params:
    """Radius, curvature and critic, on top of `sample_on_policy`."""
    params = sample_on_policy(trial, n_actions)
    batch_size_pow = suggest_batch_size_pow(trial, params["n_steps_pow"], n_envs)
    return {
        **params,
        "target_kl": trial.suggest_float("target_kl", 0.001, 0.1, log=True),
        "cg_damping": trial.suggest_float("cg_damping", 0.001, 1.0, log=True),
        "cg_max_steps": trial.suggest_int("cg_max_steps", 5, 25),
        "critic": trial.suggest_categorical("critic", ["gauss_newton", "adam"]),
        "critic_damping": trial.suggest_float("critic_damping", 0.001, 1.0, log=True),
        "critic_cg_steps": trial.suggest_int("critic_cg_steps", 4, 16),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 0.003, log=True),
        "n_critic_updates": trial.suggest_int("n_critic_updates", 5, 30),
        "batch_size_pow": batch_size_pow,
    }


def suggest_batch_size_pow(trial: optuna.Trial, n_steps_pow: int, n_envs: int) -> int:
    """A minibatch, at most a rollout long."""
    rollout_pow = n_steps_pow + n_envs.bit_length() - 1
    batch_size_pow = min(trial.suggest_int("batch_size_pow", 5, 10), rollout_pow)
    trial.set_user_attr("batch_size", 2**batch_size_pow)
    return batch_size_pow


def sample_natural_gradient_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: Params) -> Params:
    """TRPO, NPG and MaskableTRPO."""
    params = suggest_natural_gradient(trial, n_actions, n_envs)
    return convert_natural_gradient_params({**params, **suggest_action_values(trial)})


def sample_recurrent_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: Params) -> Params:
    """RecurrentTRPO and RecurrentNPG."""
    return convert_recurrent_params(
        {
            **suggest_natural_gradient(trial, n_actions, n_envs),
            "lstm_hidden_size": trial.suggest_categorical("lstm_hidden_size", [16, 32, 64, 128, 256]),
            "enable_critic_lstm": trial.suggest_categorical("enable_critic_lstm", [False, True]),
        }
    )


def sample_ppo_penalty_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: Params) -> Params:
    """PPOPenalty."""
    params = sample_on_policy(trial, n_actions)
    return convert_ppo_penalty_params(
        {
            **params,
            **suggest_action_values(trial),
            "batch_size_pow": suggest_batch_size_pow(trial, params["n_steps_pow"], n_envs),
            "learning_rate": trial.suggest_float("learning_rate", 1e-5, 0.003, log=True),
            "n_epochs": trial.suggest_categorical("n_epochs", [1, 5, 10, 20]),
            "target_kl": trial.suggest_float("target_kl", 0.003, 0.1, log=True),
            "kl_coef": trial.suggest_float("kl_coef", 0.1, 10.0, log=True),
            "ent_coef": trial.suggest_float("ent_coef", 1e-8, 0.1, log=True),
            "max_grad_norm": trial.suggest_float("max_grad_norm", 0.3, 2),
        }
    )


SAMPLERS: dict[str, Callable[[optuna.Trial, int, int, Params], Params]] = {
    "trpo": sample_natural_gradient_params,
    "npg": sample_natural_gradient_params,
    "ppo_clip": sample_ppo_params,  # the same algorithm, so the zoo's own space
    "ppo_penalty": sample_ppo_penalty_params,
    "trpo_lstm": sample_recurrent_params,
    "npg_lstm": sample_recurrent_params,
    "ppo_clip_lstm": sample_ppo_lstm_params,
    "trpo_mask": sample_natural_gradient_params,
}

CONVERTERS: dict[str, Callable[[Params], Params]] = {
    "trpo": convert_natural_gradient_params,
    "npg": convert_natural_gradient_params,
    "ppo_clip": convert_onpolicy_params,
    "ppo_penalty": convert_ppo_penalty_params,
    "trpo_lstm": convert_recurrent_params,
    "npg_lstm": convert_recurrent_params,
    "ppo_clip_lstm": convert_onpolicy_params,
    "trpo_mask": convert_natural_gradient_params,
}
