"""Which policies are plain enough to be computed without calling them, and how they then act and value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

from sb3_trpo_ext.rollout.action_values import OF_ACTION_VALUES, expectation, has_method_of, probabilities_of
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
    *OF_ACTION_VALUES,
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

    def values(self, inputs: Tensor, outputs: Tensor | None = None, masks: Array | None = None) -> Tensor:
        """V of many steps, from what was in `critic_input`, ``(T, R, F')`` -> ``(T, R)``.

        Args:
            inputs: That.
            outputs: What the policy put out for it, ``(T · R, K)``; None to compute that where V needs it.
            masks: Which actions were allowed, ``(T · R, K)``; None for all.
        """
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


class FastActionValuePolicy(FastPolicy):
    """The same for policies of `ActionValues`: V(s) = Σ_a π(a|s) Q(s,a)."""

    def act(self, masks: Array | None = None) -> Array:
        """See `FastPolicy.act`."""
        self._masks = masks
        return super().act(masks)

    def value(self) -> Tensor:
        """See `FastPolicy.value`."""
        self._critic.step()
        return self._expectation(self._critic.output, self.outputs, self._masks)

    def values(self, inputs: Tensor, outputs: Tensor | None = None, masks: Array | None = None) -> Tensor:
        """See `FastPolicy.values`."""
        outputs = self._actor.block(inputs).flatten(0, 1) if outputs is None else outputs
        action_values = self._critic.block(inputs).flatten(0, 1)
        return self._expectation(action_values, outputs, masks).view(inputs.shape[:2])

    def _expectation(self, action_values: Tensor, outputs: Tensor, masks: Array | None) -> Tensor:
        distribution: Any = self._policy.action_dist
        distribution.proba_distribution(action_logits=outputs.clone())
        if masks is not None:
            distribution.apply_masking(masks)
        return expectation(probabilities_of(distribution), action_values)


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
        lstms = [policy.lstm_actor] if policy.lstm_critic is None else [policy.lstm_actor, policy.lstm_critic]
        self._lstms = LstmStep(lstms, len(self.features), exact=self._exact)

    def is_current(self, policy: ActorCriticPolicy) -> bool:
        """Whether it stands for a policy as that is now; σ and the LSTMs' parameters are read again."""
        if not super().is_current(policy):
            return False
        self._lstms.refresh()
        return True

    def remember(self, states: RNNStates, starts: Array) -> RNNStates:
        """Let the LSTMs see what was seen; the next hidden and cell states, ``(layers, E, H)`` each.

        Args:
            states: Theirs so far.
            starts: 1 where an episode begins, whose states are zero, ``(E,)``.
        """
        if starts.any():
            begins = torch.as_tensor(starts, dtype=torch.bool).view(1, -1, 1)
            pairs: Any = (tuple(torch.where(begins, 0.0, state) for state in pair) for pair in states)
            states = RNNStates(*pairs)
        outputs, after = self._lstms(self.features, states)
        self._latent.copy_(outputs[0])
        if len(outputs) > 1:
            self.critic_input.copy_(outputs[1])
        return RNNStates(after[0], after[-1])


Pair = tuple[Tensor, Tensor]


class LstmStep:
    """One step of torch's LSTMs of equal shapes, without the calls of their modules.

    (i, f, g, o) = x Wᵀ + h Uᵀ + b, c' = σ(f) c + σ(i) tanh g, h' = σ(o) tanh c', layer by layer. NumPy takes the
    gates of all at once, and σ(z) = (1 + tanh(z/2))/2, which does not overflow.

    Args:
        lstms: The modules.
        n_envs: E.
        exact: Whether torch computes it, to round as it does; otherwise NumPy, which is quicker for a few rows.

    Raises:
        NotCoveredError: If their shapes differ.
    """

    def __init__(self, lstms: Sequence[nn.LSTM], n_envs: int, *, exact: bool) -> None:
        self._exact, self._bias, self._layers = exact, lstms[0].bias, lstms[0].num_layers
        self._weights = [[weight.detach() for weight in lstm._flat_weights if weight is not None] for lstm in lstms]
        if any(
            [each.shape for each in weights] != [each.shape for each in self._weights[0]] for weights in self._weights
        ):
            raise NotCoveredError("LSTMs of different shapes")
        width = lstms[0].hidden_size
        shape = len(lstms), n_envs, 4 * width
        self._gates, self._recurrent = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self._i, self._f, self._g, self._o = np.split(self._gates, 4, axis=2)
        self._scale = np.full(shape, 0.5, np.float32)
        self._offset = self._scale.copy()
        self._scale[:, :, 2 * width : 3 * width], self._offset[:, :, 2 * width : 3 * width] = 1, 0
        self.refresh()

    def refresh(self) -> None:
        """Take over the parameters as they are now."""
        if self._exact:
            return
        each = 4 if self._bias else 2
        self._by_layer = [
            self._read([weights[start : start + each] for weights in self._weights])
            for start in range(0, each * self._layers, each)
        ]

    def _read(self, parameters: list[list[Tensor]]) -> tuple[list[Array], list[Array], Array]:
        """Those of a layer, as NumPy multiplies most quickly: Wᵀ and Uᵀ of each LSTM, and b of all in all rows."""
        inputs, recurrents = ([each[place].t().contiguous().numpy() for each in parameters] for place in (0, 1))
        bias = np.zeros_like(self._gates)
        for row, (_, _, *biases) in zip(bias, parameters, strict=True):
            for each in biases:
                row += each.numpy()
        return inputs, recurrents, bias

    def __call__(self, features: Tensor, states: Sequence[tuple[Tensor, ...]]) -> tuple[list[Tensor], list[Pair]]:
        """Outputs ``(E, H)`` and next states of each LSTM, for features ``(E, F)`` and its state."""
        if not self._exact:
            return self._by_numpy(features.numpy(), states)
        outputs, after = [], []
        for weights, state in zip(self._weights, states, strict=False):
            output, hidden, cell = torch.lstm(
                features[None], state, weights, self._bias, self._layers, 0.0, False, False, False
            )
            outputs.append(output[0])
            after.append((hidden, cell))
        return outputs, after

    def _by_numpy(self, x: Array, states: Sequence[tuple[Tensor, ...]]) -> tuple[list[Tensor], list[Pair]]:
        gates, recurrent = self._gates, self._recurrent
        hidden, cell = ([state[part].numpy() for state in states] for part in (0, 1))
        n_lstms, n_envs, _ = gates.shape
        next_hidden = np.empty((n_lstms, self._layers, n_envs, self._i.shape[2]), np.float32)
        next_cell, inputs = np.empty_like(next_hidden), [x] * n_lstms
        for layer, (w, u, bias) in enumerate(self._by_layer):
            h, c = next_hidden[:, layer], next_cell[:, layer]
            for lstm in range(n_lstms):
                np.dot(inputs[lstm], w[lstm], gates[lstm])
                np.dot(hidden[lstm][layer], u[lstm], recurrent[lstm])
                np.copyto(c[lstm], cell[lstm][layer])
            np.add(gates, recurrent, gates)
            np.add(gates, bias, gates)
            np.multiply(gates, self._scale, gates)
            np.tanh(gates, gates)
            np.multiply(gates, self._scale, gates)
            np.add(gates, self._offset, gates)
            np.multiply(self._f, c, c)
            np.multiply(self._i, self._g, self._g)
            np.add(c, self._g, c)
            np.tanh(c, h)
            np.multiply(self._o, h, h)
            inputs = list(h)
        after = [tuple(map(torch.from_numpy, pair)) for pair in zip(next_hidden, next_cell, strict=True)]
        return [torch.from_numpy(each) for each in inputs], after  # type: ignore[return-value]


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
    own = next((name for name in OVERRIDABLE if not has_method_of(type(policy), name, known)), "")
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
