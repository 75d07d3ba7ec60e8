"""Policies whose critic has a value for each action: Q(s,·) where SB3's have V(s)."""

from __future__ import annotations

from copy import copy
from typing import Any, Literal

import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import (
    MaskableActorCriticCnnPolicy,
    MaskableActorCriticPolicy,
    MaskableMultiInputActorCriticPolicy,
)
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from sb3_trpo_ext.rollout.known_classes import KNOWN_POLICIES, owner_of

Evaluated = tuple[Tensor, Tensor, Tensor | None]

Bootstrap = Literal["expected", "max"]
"""What is expected to follow a state: Σ_a π(a|s) Q(s,a), or max_a Q(s,a)."""


class ActionValues:
    """Gives an actor-critic policy a critic with an output for each of its K discrete actions: Q(s,·).

    Listed before the policy: ``class Mine(ActionValues, MyPolicy)``. Its last layer (``value_net``) is K wide, and
    where SB3 asks for a value it gets V(s) = Σ_a π(a|s) Q(s,a), so that buffers, callbacks, save, load and evaluation
    work as they are. π is a constant in that sum: no gradient of a value reaches the actor.

    Source: the action-value functions in the boxes of TRPO and PPO in CS885, University of Waterloo, 2020.
    """

    action_space: Any
    action_dist: Any

    def _build(self, lr_schedule: Schedule) -> None:
        """Make the networks and the optimiser as the policy does, and the last layer of the critic wider."""
        parent: Any = super()
        parent._build(lr_schedule)
        policy: Any = self
        narrow = policy.value_net
        if not isinstance(narrow, nn.Linear):
            raise ValueError(
                f"{type(self).__name__} has a `value_net` of class {type(narrow).__name__}, where ActionValues needs a "
                "torch.nn.Linear to put a wider one in its place. Put the layers before it into `mlp_extractor`."
            )
        wide = policy.value_net = nn.Linear(narrow.in_features, int(self.action_space.n))
        if policy.ortho_init:
            wide.apply(lambda module: policy.init_weights(module, gain=1))
        groups, params = policy.optimizer.param_groups, policy.parameters()
        if len(groups) > 1:  # those of a policy of the user's own
            new = dict(zip(narrow.parameters(), wide.parameters(), strict=True))
            params = [{**group, "params": [new.get(param, param) for param in group["params"]]} for group in groups]
        policy.optimizer = policy.optimizer_class(params, lr=lr_schedule(1), **policy.optimizer_kwargs)

    def action_values(self, obs: PyTorchObs) -> Tensor:
        """Q(s,·), ``(N, K)``."""
        parent: Any = super()
        values: Tensor = parent.predict_values(obs)
        return values

    def probabilities(self, obs: PyTorchObs, action_masks: Any = None) -> Tensor:
        """π(·|s), without a graph, ``(N, K)``; the distribution that the policy holds stays as it is."""
        policy: Any = self
        held = self.action_dist
        self.action_dist = copy(held)
        try:
            with torch.no_grad():
                masks = {} if action_masks is None else {"action_masks": action_masks}
                return probabilities_of(policy.get_distribution(obs, **masks))
        finally:
            self.action_dist = held

    def predict_values(self, obs: PyTorchObs, action_masks: Any = None) -> Tensor:
        """V(s) = Σ_a π(a|s) Q(s,a), over the allowed actions if masks are given, ``(N, 1)``."""
        return expectation(self.probabilities(obs, action_masks), self.action_values(obs))

    def greedy_values(self, obs: PyTorchObs, action_masks: Any = None) -> Tensor:
        """max_a Q(s,a), over the allowed actions if masks are given, ``(N, 1)``."""
        values = self.action_values(obs)
        if action_masks is not None:
            allowed = torch.as_tensor(action_masks, device=values.device).view_as(values) > 0
            values = values.masked_fill(~allowed, -torch.inf)
        return values.amax(dim=1, keepdim=True)

    def forward(self, obs: PyTorchObs, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Actions, V(s) ``(N, 1)`` and log π(a|s), as the policy's own ``forward``."""
        parent: Any = super()
        actions, action_values, log_prob = parent.forward(obs, *args, **kwargs)
        masks = kwargs.get("action_masks", args[1] if len(args) > 1 else None)
        return actions, self._value_of(action_values, obs, masks), log_prob

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor, *args: Any, **kwargs: Any) -> Evaluated:
        """V(s) ``(N, 1)``, log π(a|s) and the entropy of π(·|s), as the policy's own ``evaluate_actions``."""
        action_values, log_prob, entropy = self.evaluate_action_values(obs, actions, *args, **kwargs)
        return self._value_of(action_values, obs, *args, **kwargs), log_prob, entropy

    def evaluate_action_values(self, obs: PyTorchObs, actions: Tensor, *args: Any, **kwargs: Any) -> Evaluated:
        """Q(s,·) ``(N, K)`` in place of V(s)."""
        parent: Any = super()
        evaluated: Evaluated = parent.evaluate_actions(obs, actions, *args, **kwargs)
        return evaluated

    def _value_of(self, action_values: Tensor, obs: PyTorchObs, action_masks: Any = None) -> Tensor:
        """V(s) of the states that the policy was run on last, whose π it still holds if it is one of SB3's."""
        if owner_of(self, "_get_action_dist_from_latent", KNOWN_POLICIES) is self:
            probabilities = probabilities_of(self.action_dist).detach()
        else:
            probabilities = self.probabilities(obs, action_masks)
        return expectation(probabilities, action_values)


def probabilities_of(distribution: Distribution) -> Tensor:
    """π(·|s) of SB3's categorical distributions, with its graph, ``(N, K)``."""
    found: Tensor = distribution.distribution.probs  # type: ignore[union-attr]
    return found


def of_taken(action_values: Tensor, actions: Tensor) -> Tensor:
    """Q(s,a) of the actions taken: ``(N, K)`` and ``(N,)`` -> ``(N,)``."""
    return action_values.gather(1, actions.long().view(-1, 1)).flatten()


OF_ACTION_VALUES = ("action_values", "probabilities", "greedy_values", "evaluate_action_values", "_value_of")
"""Methods that a policy of `ActionValues` has beyond those of SB3's."""


def has_action_values(policy: Any) -> bool:
    """Whether a policy, or what a wrapper such as that of ``torch.compile`` hands on to, is one of `ActionValues`."""
    method = getattr(policy, "evaluate_action_values", None)
    return isinstance(policy, ActionValues) or isinstance(getattr(method, "__self__", None), ActionValues)


def has_method_of(policy_class: type, name: str, known: type) -> bool:
    """Whether a policy class has a method as a known class has it, be there `ActionValues` before it or not."""
    if not issubclass(policy_class, ActionValues):
        return getattr(policy_class, name, None) is getattr(known, name, None)
    lines: Any = policy_class.__mro__
    behind = lines[lines.index(ActionValues) + 1 :]
    method = getattr(policy_class, name, None)
    below = next((vars(kind)[name] for kind in behind if name in vars(kind)), None)
    return method is vars(ActionValues).get(name, below) and below is getattr(known, name, None)


def following_values(policy: Any, observations: PyTorchObs, masks: Any, bootstrap: Bootstrap) -> Tensor:
    """What is expected to follow some states: Σ_a π Q or max_a Q over the allowed actions, or V(s), ``(N,)``.

    Args:
        policy: The policy.
        observations: Of the states.
        masks: Which actions they allow, ``(N, K)``; None for all. A state-value function does not look at them.
        bootstrap: ``"expected"`` or ``"max"``.
    """
    values: Tensor
    if not has_action_values(policy):
        values = policy.predict_values(observations)
    elif bootstrap == "max":
        values = policy.greedy_values(observations, masks)
    else:
        values = policy.predict_values(observations, masks)
    return values.flatten()


def expectation(probabilities: Tensor, action_values: Tensor) -> Tensor:
    """Σ_a π(a|s) Q(s,a), ``(N, 1)``; what is never done counts for nothing, be its value as it may."""
    terms = torch.where(probabilities > 0, probabilities * action_values, 0.0)
    return terms.sum(dim=1, keepdim=True)


class ActionValuePolicy(ActionValues, ActorCriticPolicy):
    """SB3's ``MlpPolicy`` with a value for each action."""


class ActionValueCnnPolicy(ActionValues, ActorCriticCnnPolicy):
    """SB3's ``CnnPolicy`` with a value for each action."""


class MultiInputActionValuePolicy(ActionValues, MultiInputActorCriticPolicy):
    """SB3's ``MultiInputPolicy`` with a value for each action."""


class MaskableActionValuePolicy(ActionValues, MaskableActorCriticPolicy):
    """sb3-contrib's maskable ``MlpPolicy`` with a value for each action."""


class MaskableActionValueCnnPolicy(ActionValues, MaskableActorCriticCnnPolicy):
    """sb3-contrib's maskable ``CnnPolicy`` with a value for each action."""


class MaskableMultiInputActionValuePolicy(ActionValues, MaskableMultiInputActorCriticPolicy):
    """sb3-contrib's maskable ``MultiInputPolicy`` with a value for each action."""


_WITH_ACTION_VALUES: dict[type[BasePolicy], type[BasePolicy]] = {
    ActorCriticPolicy: ActionValuePolicy,
    ActorCriticCnnPolicy: ActionValueCnnPolicy,
    MultiInputActorCriticPolicy: MultiInputActionValuePolicy,
    MaskableActorCriticPolicy: MaskableActionValuePolicy,
    MaskableActorCriticCnnPolicy: MaskableActionValueCnnPolicy,
    MaskableMultiInputActorCriticPolicy: MaskableMultiInputActionValuePolicy,
}


def with_action_values(policy_class: type[BasePolicy], action_space: spaces.Space) -> type[BasePolicy]:
    """The class of a policy's kind that has a value for each action.

    Args:
        policy_class: One of SB3's or sb3-contrib's, or one that derives from `ActionValues` itself.
        action_space: The actions.

    Raises:
        ValueError: If there is none.
    """
    if not isinstance(action_space, spaces.Discrete):
        raise ValueError(
            "A critic with a value for each action (`critic='action_value'`, or a policy that derives from "
            f"ActionValues) needs Discrete actions, got {action_space}. Use another critic, and a policy without."
        )
    lines = policy_class.__mro__
    if ActionValues in lines and any(kind in lines[: lines.index(ActionValues)] for kind in KNOWN_POLICIES):
        raise ValueError(
            f"{policy_class.__name__} lists ActionValues behind the policy that it is to change, which has no effect. "
            "List it first: `class Mine(sb3_trpo_ext.ActionValues, MyPolicy)`."
        )
    if issubclass(policy_class, ActionValues) and not issubclass(policy_class, RecurrentActorCriticPolicy):
        return policy_class
    if policy_class in _WITH_ACTION_VALUES:
        return _WITH_ACTION_VALUES[policy_class]
    raise ValueError(
        "`critic='action_value'` needs a policy with a value for each action, which 'MlpPolicy', 'CnnPolicy' and "
        f"'MultiInputPolicy' have without memory, got {policy_class.__name__}. Let a feed-forward policy of your own "
        f"derive from it: `class Mine(sb3_trpo_ext.ActionValues, {policy_class.__name__})`, or use another critic."
    )
