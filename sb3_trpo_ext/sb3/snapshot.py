"""An MLP policy as NumPy matrix products, and which policies are plain enough for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn
from torch.nn.modules import module as global_hooks

Array = NDArray[Any]
Layer = Callable[[Array], Array]
"""A map of rows; an activation may write into its argument."""

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


def _tanh(x: Array) -> Array:
    return np.tanh(x, out=x)


def _relu(x: Array) -> Array:
    return np.maximum(x, 0, out=x)


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
    nn.Tanh: lambda module: _tanh,
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
    # Copies: a callback may train the policy in place while the snapshot is still acting. Transposed ones, because
    # BLAS multiplies a few rows by a matrix in column order fastest.
    weight = np.asfortranarray(module.weight.detach().numpy().T.copy())
    if module.bias is None:
        return lambda x: x.dot(weight)
    bias = module.bias.detach().numpy().copy()[None]  # with the axis of a single row NumPy need not broadcast

    def layer(x: Array) -> Array:
        image: Array = x.dot(weight)
        return np.add(image, bias, out=image)

    return layer


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
        self._std = None if log_std is None else np.exp(log_std)
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

    def scaled(self, noise: Array) -> Array:
        """The noise of a whole rollout as `act` takes it: multiplied by σ where there is one."""
        return noise if self._std is None else self._std * noise

    def act(self, outputs: Array, noise: Array) -> Array:
        """Actions ``(E, ...)`` for one step, from its `scaled` noise."""
        if self._std is not None:
            return outputs + noise
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
        self._copied = self._fingerprint()
        self._actor = _layers(extractor.policy_net) + _layers(policy.action_net)
        self._critic = _layers(extractor.value_net) + _layers(policy.value_net)
        log_std = policy.log_std.detach().numpy().copy() if isinstance(policy.action_space, spaces.Box) else None
        self.sampler = ActionSampler(policy.action_space, log_std)
        assert isinstance(policy.action_net, nn.Linear)  # as _require_plain has seen
        self.noise_width = policy.action_net.out_features
        self.encode = _encoder(policy.observation_space)

    def _fingerprint(self) -> list[int]:
        parameters = self._parameters
        return [parameter._version for parameter in parameters] + list(map(torch.Tensor.data_ptr, parameters))

    def is_current(self) -> bool:
        """Whether the policy's parameters are still those that were copied."""
        return self._fingerprint() == self._copied

    def act(self, observations: Array, noise: Array) -> Array:
        """Actions for one step of all environments, from its `ActionSampler.scaled` noise."""
        return self.sampler.act(_apply(self._actor, self.encode(observations)), noise)

    def values(self, observations: Array) -> Array:
        """V(s), ``(N,)``."""
        return _apply(self._critic, self.encode(observations))[:, 0]

    def log_prob(self, observations: Array, actions: Array) -> Array:
        """Evaluate log π(a|s), ``(N,)``."""
        return self.sampler.log_prob(_apply(self._actor, self.encode(observations)), actions)


def _encoder(space: spaces.Space) -> Layer:
    """What SB3's preprocessing and FlattenExtractor do: observations -> ``(N, features)``, float32."""
    if isinstance(space, spaces.Discrete):
        rows = np.eye(int(space.n), dtype=np.float32)
        return lambda observations: rows[observations.reshape(-1).astype(np.int64)]
    if isinstance(space, spaces.MultiDiscrete):
        tables = [np.eye(int(size), dtype=np.float32) for size in space.nvec.reshape(-1)]

        def one_hot(observations: Array) -> Array:
            columns = observations.reshape(len(observations), -1).T.astype(np.int64)
            return np.concatenate([table[column] for table, column in zip(tables, columns, strict=True)], axis=1)

        return one_hot
    return lambda observations: observations.reshape(len(observations), -1).astype(np.float32)


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
