"""Which policies are plain enough to be computed without calling them, and how they then act and value."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.distributions import (
    MaskableBernoulliDistribution,
    MaskableCategoricalDistribution,
    MaskableMultiCategoricalDistribution,
)
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, MlpExtractor
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from sb3_trpo_ext.rollout.encoding import Encoder
from sb3_trpo_ext.rollout.forward import Array, Mlp, NotCoveredError
from sb3_trpo_ext.rollout.known_classes import KNOWN_POLICIES
from sb3_trpo_ext.rollout.sampling import BernoulliSampler, CategoricalSampler, GaussianSampler, Sampler

OVERRIDABLE = (
    "forward",
    "extract_features",
    "get_distribution",
    "_get_action_dist_from_latent",
    "_predict",
    "_process_sequence",
    "predict_values",
    "evaluate_actions",
    "obs_to_tensor",
    "set_training_mode",
    "train",
    "__call__",
    "__getattr__",
)
"""Methods of a policy whose overriding could change how it acts or values."""

CHOICES = (
    CategoricalDistribution,
    MaskableCategoricalDistribution,
    MultiCategoricalDistribution,
    MaskableMultiCategoricalDistribution,
    MaskableBernoulliDistribution,
)
DISTRIBUTIONS = (DiagGaussianDistribution, BernoulliDistribution, *CHOICES)

PARTS: dict[str, tuple[type, ...]] = {
    "mlp_extractor": (MlpExtractor,),
    "pi_features_extractor": (FlattenExtractor, CombinedExtractor),
    "vf_features_extractor": (FlattenExtractor, CombinedExtractor),
    "action_net": (nn.Linear,),
    "value_net": (nn.Linear,),
    "lstm_actor": (nn.LSTM, type(None)),
    "lstm_critic": (nn.LSTM, type(None)),
    "critic": (nn.Linear, type(None)),
}
"""The parts of a policy, and of which class they must be."""


class FastPolicy:
    """A policy of plain layers, acting for E environments on the parameters as they are.

    Args:
        policy: SB3's or sb3-contrib's actor-critic policy.
        n_envs: E.
        exact: Whether to round as torch does, in the last bits too.

    Attributes:
        features: What it sees, ``(E, F)``; written by `see`.
        outputs: Means or logits, ``(E, K)``; written by `act`.
        critic_input: What V is computed from, ``(E, F')``.

    Raises:
        NotCoveredError: If any part of the policy could compute otherwise than plain layers would.
    """

    def __init__(self, policy: ActorCriticPolicy, n_envs: int, *, exact: bool) -> None:
        self._policy, self._exact = policy, exact
        self._is_as_it_was = require_plain(policy)
        self._encoder = self._made_encoder()
        self.features = self._encoder.memory(n_envs)
        self._features_array = self.features.numpy()
        if self._encoder.is_copy:
            self.see = partial(np.copyto, self._features_array)  # type: ignore[method-assign]
        self._build()
        self._sampler = _sampler(policy, self.outputs, exact)

    def _made_encoder(self) -> Encoder:
        space = self._policy.observation_space
        return Encoder(space, by_index=not self._exact or isinstance(space, spaces.Discrete))

    def _build(self) -> None:
        policy, extractor = self._policy, self._policy.mlp_extractor
        self._actor = Mlp([extractor.policy_net, policy.action_net], self.features, exact=self._exact)
        self._critic = Mlp([extractor.value_net, policy.value_net], self.features, exact=self._exact)
        self.outputs, self.critic_input = self._actor.output, self.features

    def is_current(self, policy: ActorCriticPolicy) -> bool:
        """Whether it stands for a policy as that is now; σ is read again."""
        if policy is not self._policy or not self._is_as_it_was():
            return False
        if isinstance(self._sampler, GaussianSampler):
            self._sampler.refresh(policy.log_std.detach())
        return True

    def see(self, observations: Any) -> None:
        """Encode the observations of a step."""
        self._encoder.write(observations, self._features_array)

    def encoded(self, observations: Any) -> Tensor:
        """Features ``(1, F)`` of one observation, or a dict of them, as `values` takes them."""
        features = self._encoder.memory(1)
        one = isinstance(observations, dict)
        rows = {key: np.asarray(each)[None] for key, each in (observations if one else {None: observations}).items()}
        self._encoder.write(rows if one else rows[None], features.numpy())
        return features

    def act(self, masks: Array | None = None) -> Array:
        """Actions for what was seen, ``(E, ...)``, flat for Box."""
        self._actor.step()
        return self._sampler.sample(masks)

    def value(self) -> Tensor:
        """V of what was seen, ``(E, 1)``, in memory of its own."""
        self._critic.step()
        return self._critic.output.clone()

    def values(self, inputs: Tensor) -> Tensor:
        """V of many steps, from what was in `critic_input`, ``(T, R, F')`` -> ``(T, R)``."""
        return self._critic.block(inputs)[..., 0]

    def log_prob(self, outputs: Tensor, actions: Tensor, masks: Array | None = None) -> Tensor:
        """Evaluate log π(a|s), ``(N,)``, for outputs ``(N, K)`` and actions as they were drawn, ``(N, ...)``."""
        distribution: Any = self._policy.action_dist  # where SB3 leaves it as well
        if isinstance(self._sampler, GaussianSampler):
            distribution.proba_distribution(outputs, self._policy.log_std.detach())
        else:
            distribution.proba_distribution(action_logits=outputs)
        if masks is not None:
            distribution.apply_masking(masks)
        log_prob: Tensor = distribution.log_prob(actions)
        return log_prob


class FastRecurrentPolicy(FastPolicy):
    """The same for sb3-contrib's LSTM policies: what their networks see is what the LSTM puts out."""

    def _made_encoder(self) -> Encoder:
        return Encoder(self._policy.observation_space, by_index=False)

    def _build(self) -> None:
        policy: Any = self._policy
        extractor = policy.mlp_extractor
        self._latent = torch.zeros(len(self.features), policy.lstm_output_dim, dtype=torch.float32)
        self._actor = Mlp([extractor.policy_net, policy.action_net], self._latent, exact=self._exact)
        self.outputs = self._actor.output
        head = [extractor.value_net, policy.value_net]
        self.critic_input = self._latent if policy.shared_lstm else torch.zeros_like(self._latent)
        if policy.critic is not None:
            self.critic_input, head = self.features, [policy.critic, *head]
        self._critic = Mlp(head, self.critic_input, exact=self._exact)
        self._lstm_actor = LstmStep(policy.lstm_actor, exact=self._exact)
        self._lstm_critic = None if policy.lstm_critic is None else LstmStep(policy.lstm_critic, exact=self._exact)

    def remember(self, states: RNNStates, starts: Tensor) -> RNNStates:
        """Let the LSTMs see what was seen; the next hidden and cell states, ``(layers, E, H)`` each.

        Args:
            states: Theirs so far.
            starts: 1 where an episode begins, whose states are zero, ``(E,)``.
        """
        if starts.any():
            begins = starts.bool().view(1, -1, 1)
            pairs: Any = (tuple(torch.where(begins, 0.0, state) for state in pair) for pair in states)
            states = RNNStates(*pairs)
        output, after = self._lstm_actor(self.features, states.pi)
        self._latent.copy_(output)
        if self._lstm_critic is None:
            return RNNStates(after, after)
        output, after_critic = self._lstm_critic(self.features, states.vf)
        self.critic_input.copy_(output)
        return RNNStates(after, after_critic)


class LstmStep:
    """One step of torch's LSTM, without the call of its module.

    (i, f, g, o) = x Wᵀ + h Uᵀ + b, c' = σ(f) c + σ(i) tanh g, h' = σ(o) tanh c', layer by layer.

    Args:
        lstm: The module.
        exact: Whether torch computes it, to round as it does; otherwise NumPy, which is quicker for a few rows.
    """

    def __init__(self, lstm: nn.LSTM, *, exact: bool) -> None:
        self._exact = exact
        self._weights = [weight.detach() for weight in lstm._flat_weights if weight is not None]
        self._bias, self._layers = lstm.bias, lstm.num_layers
        arrays, each = [weight.numpy() for weight in self._weights], 4 if lstm.bias else 2
        self._arrays = [arrays[start : start + each] for start in range(0, len(arrays), each)]

    def __call__(self, features: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Outputs ``(E, H)`` and the next states for features ``(E, F)``."""
        if not self._exact:
            return self._by_numpy(features.numpy(), *(state.numpy() for state in states))
        output, hidden, cell = torch.lstm(
            features[None], states, self._weights, self._bias, self._layers, 0.0, False, False, False
        )
        return output[0], (hidden, cell)

    def _by_numpy(self, x: Array, hidden: Array, cell: Array) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        next_hidden, next_cell = np.empty_like(hidden), np.empty_like(cell)
        for layer, (w, u, *biases) in enumerate(self._arrays):
            gates = x @ w.T
            gates += hidden[layer] @ u.T
            for bias in biases:
                gates += bias
            width = cell.shape[2]
            # σ(z) = (1 + tanh(z/2))/2, which does not overflow
            gates[:, : 2 * width] *= 0.5
            gates[:, 3 * width :] *= 0.5
            np.tanh(gates, out=gates)
            i, f, g, o = (gates[:, start * width : (start + 1) * width] for start in range(4))
            next_cell[layer] = 0.5 * ((1 + f) * cell[layer] + (1 + i) * g)
            np.multiply(0.5 * (1 + o), np.tanh(next_cell[layer]), out=next_hidden[layer])
            x = next_hidden[layer]
        return torch.from_numpy(x), (torch.from_numpy(next_hidden), torch.from_numpy(next_cell))


def _sampler(policy: ActorCriticPolicy, outputs: Tensor, exact: bool) -> Sampler:
    distribution: Any = policy.action_dist
    if isinstance(distribution, DiagGaussianDistribution):
        return GaussianSampler(outputs, policy.log_std.detach())
    if isinstance(distribution, BernoulliDistribution):
        return BernoulliSampler(outputs)
    single = isinstance(distribution, (CategoricalDistribution, MaskableCategoricalDistribution))
    sizes = [distribution.action_dim] if single else distribution.action_dims
    return CategoricalSampler(outputs, tuple(int(size) for size in sizes), single=single, exact=exact)


def require_plain(policy: ActorCriticPolicy) -> Callable[[], bool]:
    """Raise `NotCoveredError` unless all that the policy does on the way to an action is known here.

    Returns:
        Whether that still holds, and the parameters are where they were.
    """
    known = next((kind for kind in KNOWN_POLICIES if isinstance(policy, kind)), None)
    if known is None:
        raise NotCoveredError(f"policy of class {type(policy).__name__}")
    own = next(
        (name for name in OVERRIDABLE if getattr(type(policy), name, None) is not getattr(known, name, None)), ""
    )
    if own:
        raise NotCoveredError(f"{type(policy).__name__} has its own {own}")
    if type(policy.action_dist) not in DISTRIBUTIONS:
        raise NotCoveredError(f"action distribution {type(policy.action_dist).__name__}")
    for param in policy.parameters():
        if param.device.type != "cpu" or param.dtype != torch.float32 or not param.is_contiguous():
            raise NotCoveredError("parameters that are not float32, contiguous and on the CPU")
    _require_plain_parts(policy)
    structure = Structure(policy)
    structure.require_unhooked()
    return structure.is_unchanged


def _require_plain_parts(policy: ActorCriticPolicy) -> None:
    """Raise `NotCoveredError` unless the modules of a policy are of the known classes, used as SB3 uses them."""
    for name, kinds in PARTS.items():
        if type(getattr(policy, name, None)) not in kinds:
            raise NotCoveredError(f"{name} of class {type(getattr(policy, name)).__name__}")
    if policy.share_features_extractor and not (
        policy.features_extractor is policy.pi_features_extractor is policy.vf_features_extractor
    ):
        raise NotCoveredError("a features extractor that is shared in part")
    for name in ("lstm_actor", "lstm_critic"):
        lstm = getattr(policy, name, None)
        if lstm is not None and (lstm.proj_size or lstm.bidirectional or lstm.batch_first):
            raise NotCoveredError(f"{name} with options of its own")
    for extractor in (policy.pi_features_extractor, policy.vf_features_extractor):
        _require_flattening(extractor, policy.observation_space)


def _require_flattening(extractor: nn.Module, space: spaces.Space) -> None:
    """Raise `NotCoveredError` unless an extractor flattens what it is given, and concatenates it in SB3's order."""
    parts: Any = extractor.extractors if isinstance(extractor, CombinedExtractor) else {None: extractor.flatten}
    keys = list(space.spaces) if isinstance(space, spaces.Dict) else [None]
    if list(parts) != keys or any(type(part) is not nn.Flatten for part in parts.values()):
        raise NotCoveredError(f"{type(extractor).__name__} with parts of its own")


class Structure:
    """The modules of a policy, their parameters and where these are: what a `FastPolicy` was made from.

    Args:
        policy: The policy.
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self._policy: Any = policy
        self._distribution = policy.action_dist
        self._modules = list(policy.named_modules())
        tables = [table for _, module in self._modules for table in (module._modules, module._parameters)]
        self._sizes = [(table, len(table)) for table in tables]
        self._entries: list[tuple[Any, str, Any]] = [(table, *entry) for table in tables for entry in table.items()]
        self._places = [(param, _place(param)) for param in policy.parameters()]

    def require_unhooked(self) -> None:
        """Raise `NotCoveredError` if a hook or a replaced method could change what a module computes."""
        if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
            raise NotCoveredError("global forward hooks")
        if any(map(callable, vars(self._distribution).values())):
            raise NotCoveredError("an action distribution with methods of its own")
        for name in OVERRIDABLE:
            if name in vars(self._policy):
                raise NotCoveredError(f"{type(self._policy).__name__} has its own {name}")
        for name, module in self._modules:
            replaced = any(attribute.startswith("forward") for attribute in vars(module))
            if module._forward_hooks or module._forward_pre_hooks or replaced:
                raise NotCoveredError(f"a hook or replaced method of {name or 'the policy'}")

    def is_unchanged(self) -> bool:
        """Whether all is as it was; what the parameters hold may differ."""
        if not (
            self._policy.action_dist is self._distribution
            and all(table.get(name) is part for table, name, part in self._entries)
            and all(len(table) == size for table, size in self._sizes)
            and all(_place(param) == place for param, place in self._places)
        ):
            return False
        try:
            self.require_unhooked()
        except NotCoveredError:
            return False
        return True


def _place(param: Tensor) -> tuple[Any, ...]:
    """Where the numbers of a parameter are, and in which order."""
    return param.data_ptr(), param.shape, param.stride(), param.dtype
