"""Fast rollouts for MLP policies on the CPU: the actor as NumPy matrix products, everything else in one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from stable_baselines3.common.vec_env import VecEnv
from torch import nn
from torch.nn.modules import module as global_hooks

Array = NDArray[Any]
Layer = Callable[[Array], Array]

OVERRIDABLE = (
    "forward",
    "extract_features",
    "get_distribution",
    "_get_action_dist_from_latent",
    "_predict",
    "predict_values",
    "evaluate_actions",
    "obs_to_tensor",
    "set_training_mode",
    "train",
    "__call__",
    "__getattr__",
)
"""Methods of ActorCriticPolicy whose overriding could change how it acts or values."""


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _elu(module: nn.Module) -> Layer:
    assert isinstance(module, nn.ELU)
    alpha = float(module.alpha)
    return lambda x: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def _leaky_relu(module: nn.Module) -> Layer:
    assert isinstance(module, nn.LeakyReLU)
    slope = float(module.negative_slope)
    return lambda x: np.where(x > 0, x, slope * x)


ACTIVATIONS: dict[type[nn.Module], Callable[[nn.Module], Layer]] = {
    nn.Tanh: lambda module: np.tanh,
    nn.ReLU: lambda module: _relu,
    nn.Sigmoid: lambda module: _sigmoid,
    nn.SiLU: lambda module: lambda x: x * _sigmoid(x),
    nn.ELU: _elu,
    nn.LeakyReLU: _leaky_relu,
    nn.Identity: lambda module: lambda x: x,
}


DISTRIBUTIONS = (
    DiagGaussianDistribution,
    CategoricalDistribution,
    MultiCategoricalDistribution,
    BernoulliDistribution,
)
OBSERVATIONS = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


class NotCoveredError(Exception):
    """The fast path does not cover this model; the message says why."""


def _linear(module: nn.Linear) -> Layer:
    # Contiguous copies: a callback may train the policy in place while the snapshot is still acting.
    weight = np.ascontiguousarray(module.weight.detach().numpy().T.copy())
    if module.bias is None:
        return lambda x: x @ weight
    bias = module.bias.detach().numpy().copy()
    return lambda x: x @ weight + bias


def _layers(module: nn.Module) -> list[Layer]:
    layers = []
    for layer in module if isinstance(module, nn.Sequential) else [module]:
        if type(layer) is nn.Linear:
            layers.append(_linear(layer))
        elif type(layer) in ACTIVATIONS:
            layers.append(ACTIVATIONS[type(layer)](layer))
        else:
            raise NotCoveredError(f"layer {type(layer).__name__}")
    return layers


def _apply(layers: list[Layer], x: Array) -> Array:
    for layer in layers:
        x = layer(x)
    return x


class ActionSampler:
    """Turns the actor's outputs and noise drawn in advance into actions and log-probabilities.

    Args:
        action_space: Box, Discrete, MultiDiscrete or MultiBinary.
        log_std: log σ of the Gaussian, ``(A,)``; only for Box.
    """

    def __init__(self, action_space: spaces.Space, log_std: Array | None) -> None:
        self._space = action_space
        self._log_std = log_std
        self._sizes = (
            [int(action_space.n)]
            if isinstance(action_space, spaces.Discrete)
            else [int(size) for size in getattr(action_space, "nvec", [])]
        )
        self._ends = np.cumsum(self._sizes)[:-1]

    def noise(self, n_steps: int, n_envs: int, width: int) -> Array:
        """Noise of a whole rollout, ``(T, E, width)``, from torch's seeded generator."""
        if isinstance(self._space, spaces.Box):
            return torch.randn(n_steps, n_envs, width).numpy()
        uniform = torch.rand(n_steps, n_envs, width).clamp_(min=torch.finfo(torch.float32).tiny)
        if isinstance(self._space, spaces.MultiBinary):
            return uniform.numpy()
        return (-torch.log(-torch.log(uniform))).numpy()  # Gumbel: argmax(logits + noise) ~ softmax(logits)

    def act(self, outputs: Array, noise: Array) -> Array:
        """Actions ``(E, ...)`` for one step."""
        if self._log_std is not None:
            return outputs + np.exp(self._log_std) * noise
        if isinstance(self._space, spaces.MultiBinary):
            return (noise < _sigmoid(outputs)).astype(self._space.dtype)
        scores = outputs + noise
        if isinstance(self._space, spaces.Discrete):
            return scores.argmax(axis=1)
        return np.stack([part.argmax(axis=1) for part in np.split(scores, self._ends, axis=1)], axis=1)

    def log_prob(self, outputs: Array, actions: Array) -> Array:
        """Evaluate log π(a|s), ``(N,)``, of actions ``(N, A)``."""
        if self._log_std is not None:
            z = (actions - outputs) * np.exp(-self._log_std)
            return (-0.5 * z * z - self._log_std - 0.5 * np.log(2 * np.pi)).sum(axis=1)
        if isinstance(self._space, spaces.MultiBinary):
            return -np.logaddexp(0, np.where(actions > 0, -outputs, outputs)).sum(axis=1)
        total = np.zeros(len(outputs), dtype=outputs.dtype)
        for logits, chosen in zip(np.split(outputs, self._ends, axis=1), actions.T, strict=True):
            picked = np.take_along_axis(logits, chosen.astype(np.int64)[:, None], axis=1)[:, 0]
            total += picked - np.logaddexp.reduce(logits, axis=1)
        return total


class PolicySnapshot:
    """A NumPy copy of an MLP policy: how it acts and values, until its parameters change.

    Args:
        policy: The policy.

    Raises:
        NotCoveredError: If any part of the policy could behave otherwise than plain matrix products would.
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        _require_plain(policy)
        extractor = policy.mlp_extractor
        self._parameters = list(policy.parameters())
        self._version = self._fingerprint()
        self._actor = _layers(extractor.policy_net) + _layers(policy.action_net)
        self._critic = _layers(extractor.value_net) + _layers(policy.value_net)
        log_std = policy.log_std.detach().numpy().copy() if isinstance(policy.action_space, spaces.Box) else None
        self.sampler = ActionSampler(policy.action_space, log_std)
        assert isinstance(policy.action_net, nn.Linear)  # as _require_plain has seen
        self.noise_width = policy.action_net.out_features
        self._space = policy.observation_space

    def _fingerprint(self) -> list[tuple[int, int]]:
        return [(parameter.data_ptr(), parameter._version) for parameter in self._parameters]

    def is_current(self) -> bool:
        """Whether the policy's parameters are still those that were copied."""
        return self._fingerprint() == self._version

    def encode(self, observations: Array) -> Array:
        """What SB3's preprocessing and FlattenExtractor give: ``(N, features)``, float32."""
        space = self._space
        if isinstance(space, spaces.Discrete):
            return np.eye(int(space.n), dtype=np.float32)[observations.reshape(-1).astype(np.int64)]
        flat = observations.reshape(len(observations), -1)
        if isinstance(space, spaces.MultiDiscrete):
            columns = zip(space.nvec.reshape(-1), flat.T.astype(np.int64), strict=True)
            return np.concatenate([np.eye(int(size), dtype=np.float32)[column] for size, column in columns], axis=1)
        return flat.astype(np.float32)

    def act(self, observations: Array, noise: Array) -> Array:
        """Actions for one step of all environments."""
        return self.sampler.act(_apply(self._actor, self.encode(observations)), noise)

    def values(self, observations: Array) -> Array:
        """V(s), ``(N,)``."""
        return _apply(self._critic, self.encode(observations))[:, 0]

    def log_prob(self, observations: Array, actions: Array) -> Array:
        """Evaluate log π(a|s), ``(N,)``."""
        return self.sampler.log_prob(_apply(self._actor, self.encode(observations)), actions)


def _require_plain(policy: ActorCriticPolicy) -> None:
    """Raise `NotCoveredError` unless everything that the policy does on the way to an action is known here."""
    for name in OVERRIDABLE:
        if name in vars(policy) or getattr(type(policy), name) is not getattr(ActorCriticPolicy, name):
            raise NotCoveredError(f"{type(policy).__name__} has its own {name}")
    if type(policy.action_dist) not in DISTRIBUTIONS:
        raise NotCoveredError(f"action distribution {type(policy.action_dist).__name__}")
    if any(param.device.type != "cpu" or param.dtype != torch.float32 for param in policy.parameters()):
        raise NotCoveredError("parameters that are not float32 on the CPU")
    if not isinstance(policy.observation_space, OBSERVATIONS) or is_image_space(policy.observation_space):
        raise NotCoveredError(f"observation space {policy.observation_space}")
    parts = {
        "mlp_extractor": MlpExtractor,
        "pi_features_extractor": FlattenExtractor,
        "vf_features_extractor": FlattenExtractor,
        "action_net": nn.Linear,
        "value_net": nn.Linear,
    }
    for name, kind in parts.items():
        if type(getattr(policy, name)) is not kind:
            raise NotCoveredError(f"{name} of class {type(getattr(policy, name)).__name__}")
    _require_unhooked(policy)


def _require_unhooked(policy: ActorCriticPolicy) -> None:
    """Raise `NotCoveredError` if a hook or a replaced method could change what a module computes."""
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        raise NotCoveredError("global forward hooks")
    for name, module in policy.named_modules():
        replaced = any(attribute.startswith("forward") for attribute in vars(module))
        if module._forward_hooks or module._forward_pre_hooks or replaced:
            raise NotCoveredError(f"a hook or replaced method of {name or 'the policy'}")


@dataclass
class Timeouts:
    """Terminal observations of episodes that a time limit ended, to be bootstrapped in one batch."""

    steps: list[int] = field(default_factory=list)
    envs: list[int] = field(default_factory=list)
    observations: list[Array] = field(default_factory=list)

    def note(self, step: int, dones: Array, infos: list[dict[str, Any]]) -> None:
        """Remember the timeouts among the episodes that ended at a step."""
        for env in np.flatnonzero(dones):
            terminal = infos[env].get("terminal_observation")
            if terminal is not None and infos[env].get("TimeLimit.truncated", False):
                self.steps.append(step)
                self.envs.append(int(env))
                self.observations.append(terminal)


class FastRollout:
    """One rollout by a `PolicySnapshot`, written into SB3's own `RolloutBuffer`.

    Callbacks are called as SB3 calls them, and find SB3's names in ``locals``, except ``values`` and ``log_probs``,
    which do not exist before the end of the rollout. If a callback changes the policy, the steps so far are valued
    with the policy that took them and the rollout goes on with the new one.

    Args:
        model: The algorithm that collects.
        snapshot: Its policy.
        env: The environments.
        buffer: The buffer to fill.
        n_steps: Steps of each environment.
    """

    def __init__(self, model: Any, snapshot: PolicySnapshot, env: VecEnv, buffer: RolloutBuffer, n_steps: int) -> None:
        self._model = model
        self._snapshot = snapshot
        self._env = env
        self._buffer = buffer
        self._n_steps = n_steps
        self._valued = 0
        self._timeouts = Timeouts()

    def collect(self, callback: BaseCallback) -> bool:
        """Fill the buffer; False if the callback stopped the rollout."""
        model, buffer = self._model, self._buffer
        model.policy.set_training_mode(False)
        buffer.reset()
        callback.on_rollout_start()
        noise = self._snapshot.sampler.noise(self._n_steps, self._env.num_envs, self._snapshot.noise_width)
        names: dict[str, Any] = {
            "self": model,
            "env": self._env,
            "callback": callback,
            "rollout_buffer": buffer,
            "n_rollout_steps": self._n_steps,
        }
        for step in range(self._n_steps):
            names["n_steps"] = step
            self._step(step, noise[step], names)
            callback.update_locals(names)
            if not callback.on_step():
                self._value_steps(step)
                return False
            self._store(step, names)
            if not self._snapshot.is_current():
                self._value_steps(step + 1)
                self._snapshot = PolicySnapshot(model.policy)

        self._value_steps(self._n_steps)
        last_values = torch.from_numpy(self._snapshot.values(model._last_obs))
        buffer.compute_returns_and_advantage(last_values=last_values, dones=names["dones"])
        callback.update_locals({**names, "n_steps": self._n_steps, "values": last_values})
        callback.on_rollout_end()
        return True

    def _step(self, step: int, noise: Array, names: dict[str, Any]) -> None:
        """Act once in all environments."""
        observations, space = self._model._last_obs, self._model.action_space
        actions = self._snapshot.act(observations, noise)
        clipped = actions
        if isinstance(space, spaces.Box):
            if not np.isfinite(actions).all():
                raise ValueError("The policy's action is not finite.")
            actions = actions.reshape(-1, *space.shape)
            clipped = np.clip(actions, space.low, space.high)
        new_obs, rewards, dones, infos = self._env.step(clipped)
        self._model.num_timesteps += self._env.num_envs
        names.update(
            obs_tensor=torch.as_tensor(observations),
            actions=actions,
            clipped_actions=clipped,
            new_obs=new_obs,
            rewards=rewards,
            dones=dones,
            infos=infos,
        )

    def _store(self, step: int, names: dict[str, Any]) -> None:
        """Write the step into the buffer and move on."""
        model, buffer, dones = self._model, self._buffer, names["dones"]
        model._update_info_buffer(names["infos"], dones)
        buffer.observations[step] = model._last_obs.reshape(buffer.observations[step].shape)
        buffer.actions[step] = names["actions"].reshape(buffer.actions[step].shape)
        buffer.rewards[step] = names["rewards"]
        buffer.episode_starts[step] = model._last_episode_starts
        buffer.pos = step + 1
        buffer.full = buffer.pos == buffer.buffer_size
        if dones.any():
            self._timeouts.note(step, dones, names["infos"])
        model._last_obs, model._last_episode_starts = names["new_obs"], dones

    def _value_steps(self, end: int) -> None:
        """Values, log-probabilities and timeout bootstraps of the steps not yet valued, up to ``end``."""
        buffer, start = self._buffer, self._valued
        if end == start:
            return
        shape = buffer.values[start:end].shape
        observations = buffer.observations[start:end].reshape(-1, *buffer.obs_shape)
        actions = buffer.actions[start:end].reshape(len(observations), -1)
        buffer.values[start:end] = self._snapshot.values(observations).reshape(shape)
        buffer.log_probs[start:end] = self._snapshot.log_prob(observations, actions).reshape(shape)
        timeouts, self._timeouts = self._timeouts, Timeouts()
        if timeouts.steps:
            terminal = self._snapshot.values(np.stack(timeouts.observations))
            buffer.rewards[timeouts.steps, timeouts.envs] += self._model.gamma * terminal
        self._valued = end


def fast_rollout(model: Any, env: VecEnv, buffer: RolloutBuffer, n_steps: int) -> FastRollout:
    """The fast path for a model.

    Raises:
        NotCoveredError: If it does not cover the model; the message says why.
    """
    if type(buffer) is not RolloutBuffer:
        raise NotCoveredError(f"rollout buffer {type(buffer).__name__}")
    return FastRollout(model, PolicySnapshot(model.policy), env, buffer, n_steps)
