"""The value-function fits. None of them moves a parameter that the policy's output reaches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy, BaseModel
from torch import Tensor, nn

from sb3_trpo_ext.core.arguments import check_share
from sb3_trpo_ext.core.curvature import Jacobian, Linearization
from sb3_trpo_ext.core.parameters import gradient, trainable
from sb3_trpo_ext.policy.memory_budget import MEMORY_BUDGET
from sb3_trpo_ext.policy.plain_policy import PlainPolicy
from sb3_trpo_ext.rollout.action_values import ActionValues, Bootstrap, has_action_values, has_method_of, of_taken
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.rollout.known_classes import owner_of
from sb3_trpo_ext.rollout.past_rollouts import PastRollout

KNOWN_VALUES = (ActorCriticPolicy, MaskableActorCriticPolicy)
"""Policies whose V goes from the critic's features through its MLP."""

ONE_ROLLOUT = "1 fits every rollout by itself."
"""Advice about a number of rollouts that is none."""


@dataclass(frozen=True)
class Regression:
    """What a critic is asked to do: fit V(s), or Q(s,a) of the actions taken, to the returns R of its samples.

    Attributes:
        policy: The policy; ``policy.optimizer`` has the learning rate in force.
        batch: The samples of the newest rollout, and after them those of as many earlier ones as the critic is fitted
            on besides (`Critic.n_rollouts`), with the returns that these have for the policy as it is now.
        frozen: Parameters that must stay as they are: the actor's.
        minibatches: One epoch of minibatches of `batch`, or of that with other observations.
        epochs: The model's ``n_critic_updates``.
        curvature_samples: The model's, or None.
        chunk_size: Most samples in one forward pass; None for all at once.
        minibatches_are_parts: Whether they are cut from what they are given; a buffer of the user's deals out its own.
        plain: What stands for a policy of plain layers; None for another, or to ask the policy itself.
        trajectories: The newest rollout with its rewards and what followed it, in the order of the batch; None where
            the order is not known.
        discount: γ.
        bootstrap: What is expected to follow a state: ``"expected"``, V(s), or ``"max"``, max_a Q(s,a).
    """

    policy: ActorCriticPolicy
    batch: Batch
    frozen: AbstractSet[nn.Parameter] = frozenset()
    minibatches: Callable[[Batch], Iterator[Batch]] = lambda batch: iter([batch])
    epochs: int = 1
    curvature_samples: int | None = None
    chunk_size: int | None = None
    minibatches_are_parts: bool = True
    plain: PlainPolicy | None = None
    trajectories: PastRollout | None = None
    discount: float = 1.0
    bootstrap: Bootstrap = "expected"


class Critic(ABC):
    """Fits V(s) to the returns of one rollout after the other.

    A model makes one, from its ``critic`` and ``critic_kwargs``, and keeps it. What `state_dict` returns is saved and
    loaded with the model, and restored when an update is undone.

    Attributes:
        n_rollouts: M: the critic is fitted on the last M rollouts. The model keeps them: their samples are in
            `Regression.batch`. 1 unless a critic says otherwise; what has no order or hidden states allows no more.
        gae_lambda: λ of the returns that it is fitted to; None for that of the advantages, the model's ``gae_lambda``.
        needs_order: Whether `fit` needs ``regression.trajectories``; a model that has none is then refused.
    """

    n_rollouts: int = 1
    gae_lambda: float | None = None
    needs_order: ClassVar[bool] = False

    @abstractmethod
    def fit(self, regression: Regression) -> float:
        """Fit V, leaving the frozen parameters as they are.

        Returns:
            The mean squared error E[(V(s) - R)²].
        """

    def state_dict(self) -> dict[str, Any]:
        """What the critic has learnt beside the policy's parameters.

        Dicts and lists of tensors, numbers, texts and None: what torch loads without running code. A critic that has
        this method of its own has a state.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Take over what `state_dict` returned."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state, got {', '.join(state)}.")


class ValueFunction:
    """V(s) on (parts of) a batch, its features computed once where the fit leaves the extractor alone.

    Args:
        regression: Whose policy, samples and parameters.
        keep_features: Whether features may be kept at all.
        by_hand: Whether V of a policy of plain layers may be computed by hand: `gradient` and `jacobian` then give its
            derivatives, and autograd does not.

    Attributes:
        params: The parameters that it may move.
        batch: The samples, with features in place of observations if they are fixed.
        by_hand: What stands for the policy, where V is computed from fixed features by plain layers; or None.
    """

    def __init__(self, regression: Regression, *, keep_features: bool = True, by_hand: bool = False) -> None:
        self._policy = policy = regression.policy
        self._plain: Any = _plain_critic_of(policy)
        self.params = [param for param in trainable(policy) if param not in regression.frozen]
        self.batch = regression.batch
        self._fixed = keep_features and self._has_fixed_features(len(self.batch))
        if self._fixed:
            self.batch = replace(self.batch, observations=self._features(self.batch, regression.chunk_size))
        self.by_hand = regression.plain if self._fixed and by_hand else None

    def __call__(self, batch: Batch) -> Tensor:
        """V on a part of `batch`, ``(N,)``."""
        if not self._fixed:
            return batch.values(self._policy)
        features = batch.inputs
        assert isinstance(features, Tensor)
        if self.by_hand is not None:
            values = self.by_hand.values(features)
        else:
            values = self._plain.value_net(self._plain.mlp_extractor.forward_critic(features))
        return of_taken(values, batch.actions) if isinstance(self._plain, ActionValues) else values.flatten()

    def gradient(self, terms: Iterable[Tensor]) -> dict[nn.Parameter, Tensor]:
        """Gradient of a sum of scalars, each of what was asked last when it is come by; see `parameters.gradient`."""
        return gradient(terms, self.params) if self.by_hand is None else self.by_hand.gradient(terms)

    def jacobian(self, batch: Batch, params: Sequence[nn.Parameter]) -> Jacobian:
        """∂V/∂θ on a part of `batch`."""
        features = batch.inputs
        if self.by_hand is not None and isinstance(features, Tensor):
            return self.by_hand.critic_jacobian(features, params, batch.actions)
        return Linearization(self(batch), params)

    def _has_fixed_features(self, size: int) -> bool:
        """Whether V is SB3's own, its extractor not to be moved, and the features fit into memory."""
        if self._plain is None:
            return False
        extractor = self._plain.vf_features_extractor
        moved = set(self.params)
        bytes_needed = size * extractor.features_dim * torch.finfo(torch.float32).bits // 8
        return bytes_needed <= MEMORY_BUDGET and not any(param in moved for param in extractor.parameters())

    @torch.no_grad()
    def _features(self, batch: Batch, chunk_size: int | None) -> Tensor:
        policy = self._plain
        extract = BaseModel.extract_features  # what ActorCriticPolicy.predict_values calls
        return torch.cat(
            [extract(policy, part.inputs, policy.vf_features_extractor) for part in batch.split(chunk_size)]
        )


def _plain_critic_of(policy: ActorCriticPolicy) -> Any:
    """What has the modules of a critic of which `KNOWN_VALUES` holds, or None."""
    found = owner_of(policy, "predict_values", KNOWN_VALUES)
    if found is not None or not has_action_values(policy):
        return found
    owner = owner_of(policy, "action_values", [ActionValues])
    is_usual = any(has_method_of(type(owner), "predict_values", kind) for kind in KNOWN_VALUES)
    return owner if is_usual else None


def check_decay(value: float | None) -> None:
    """Raise `ValueError` unless ``value`` is a λ in [0, 1], or None for the model's."""
    if value is not None:
        check_share("critic_kwargs['gae_lambda']", value, hint="Leave it out for the model's `gae_lambda`.")


def has_state(critic: Critic) -> bool:
    """Whether a critic's state is saved and loaded with the model."""
    return type(critic).state_dict is not Critic.state_dict


def check_saveable(critic: Critic) -> None:
    """Raise `TypeError` naming what of a critic's state could be saved, but not be loaded again."""

    def check(place: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                check(f"{place}[{key!r}]", each)
        elif type(value) in (list, tuple):
            for index, each in enumerate(value):
                check(f"{place}[{index}]", each)
        elif value is not None and not isinstance(value, (Tensor, bool, int, float, str)):
            raise TypeError(
                f"`{type(critic).__name__}.state_dict()` must hold tensors, numbers, texts or None in dicts or lists; "
                f"{place} is a {type(value).__name__}, which torch would not load. Return a tensor or a list."
            )

    check("state", critic.state_dict())
