"""A policy of plain layers: its outputs, gradients and Jacobian products by hand instead of by autograd."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any
from weakref import finalize

import torch
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.distributions import DiagGaussianDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BaseModel
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor, nn

from sb3_trpo_ext.core.curvature import Jacobian
from sb3_trpo_ext.core.flat_optimizer import is_awaited, is_observed
from sb3_trpo_ext.core.parameters import flatten, trainable, unflatten
from sb3_trpo_ext.policy.distributions import OWN_FAMILIES, family_of
from sb3_trpo_ext.policy.perceptron import Perceptron, parameters_of
from sb3_trpo_ext.rollout.action_values import ActionValues, of_taken
from sb3_trpo_ext.rollout.fast_policy import require_plain
from sb3_trpo_ext.rollout.forward import NotCoveredError

KEPT_BYTES = 64 * 2**20
"""Memory that a policy's networks may hold from one update to the next."""


class PlainPolicy:
    """SB3's or sb3-contrib's actor-critic policy of plain layers, asked as the policy itself is asked.

    It is on the policy's own parameters as they are, and sets the policy's own distribution. It may be kept from update
    to update, for as long as `renewed` says so, and with it the memory of its networks.

    Args:
        policy: The policy.

    Attributes:
        actor_modules: From features to means or logits.
        critic_modules: From features to V.
        log_std: log σ of a Gaussian; None for others.
        family: The geometry of its distribution, one of `policy.distributions`' own.
        n_features: F, what actor and critic see.
        has_action_values: Whether the critic has a value for each action.

    Raises:
        NotCoveredError: If any part of the policy could compute otherwise than plain layers would, somebody may look at
            a gradient on its way, or a parameter is shared between actor and critic, or frozen (log σ may be).
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self._is_as_it_was = require_plain(policy)
        if len({param.data_ptr() for param in policy.parameters()}) < len(list(policy.parameters())):
            raise NotCoveredError("parameters that share their memory")
        if isinstance(policy, RecurrentActorCriticPolicy):
            raise NotCoveredError("a policy with memory")
        self._policy: Any = policy
        self.has_action_values = isinstance(policy, ActionValues)
        self.log_std: nn.Parameter | None = None
        if isinstance(policy.action_dist, DiagGaussianDistribution):
            self.log_std = policy.log_std
            if self.log_std.shape != (policy.action_net.out_features,):
                raise NotCoveredError("a log σ that is not one of each dimension")
        self._require_usual()
        self.family: Any = family_of(policy.action_dist)
        self.n_features = int(policy.pi_features_extractor.features_dim)
        self.actor_modules = [policy.mlp_extractor.policy_net, policy.action_net]
        self.critic_modules = [policy.mlp_extractor.value_net, policy.value_net]
        if self.actor_parameters() & self.critic_parameters():
            raise NotCoveredError("layers that actor and critic share")
        self._networks: dict[tuple[str, int], Perceptron] = {}
        self._returned: dict[tuple[str, int], list[Perceptron]] = {}
        self._last: Any = None
        self._leaves: dict[nn.Parameter, Tensor] = {}

    def _require_usual(self) -> None:
        """What may change although the parts of the policy stay the same."""
        if type(family_of(self._policy.action_dist)) not in OWN_FAMILIES:
            raise NotCoveredError("a family of the user's own")
        if is_observed(self._policy):
            raise NotCoveredError("a hook of a parameter or a module")
        if not all(param.requires_grad for param in self._policy.parameters() if param is not self.log_std):
            raise NotCoveredError("frozen parameters")
        if self._is_awaited():
            self._let_go()
        if self._is_awaited():
            raise NotCoveredError("somebody who waits for the gradient of a parameter")

    def _is_awaited(self) -> bool:
        return any(map(is_awaited, trainable(self._policy)))

    @torch.no_grad()
    def _let_go(self) -> None:
        """Give the policy's distribution other parameters: those that autograd left have a graph, and nobody asks."""
        policy, y = self._policy, self._policy.action_net.weight.new_zeros(1, self._policy.action_net.out_features)
        if isinstance(policy.action_dist, DiagGaussianDistribution):
            policy.action_dist.proba_distribution(y, policy.log_std)
        else:
            policy.action_dist.proba_distribution(action_logits=y)

    def renewed(self, policy: ActorCriticPolicy) -> PlainPolicy:
        """What stands for a policy in another update: itself, if it is the same policy with the same parts."""
        if policy is not self._policy or not self._is_as_it_was():
            return PlainPolicy(policy)
        require_plain(policy)
        self._require_usual()
        self._last, self._leaves = None, {}
        kept = [*self._networks.values(), *chain.from_iterable(self._returned.values())]
        if sum(network.nbytes for network in kept) > KEPT_BYTES:
            self._networks.clear()
            self._returned.clear()
        return self

    def __reduce__(self) -> Any:
        """None takes its place in a copy, which makes its own."""
        return type(None), ()

    def actor_parameters(self) -> set[nn.Parameter]:
        """Those that π depends on and that can be trained."""
        found = {*parameters_of(self.actor_modules)}
        return found if self.log_std is None or not self.log_std.requires_grad else found | {self.log_std}

    def critic_parameters(self) -> set[nn.Parameter]:
        """Those that V depends on."""
        return {*parameters_of(self.critic_modules)}

    def trained_parameters(self) -> list[nn.Parameter]:
        """Those of π and V, in the order of `parameters`."""
        reached = self.actor_parameters() | self.critic_parameters()
        return [param for param in self.parameters() if param in reached]

    def parameters(self) -> list[nn.Parameter]:
        """Those of the policy."""
        return list(self._policy.parameters())

    def features(self, observations: PyTorchObs) -> Tensor:
        """Flat features ``(N, F)``, as the policy's extractors compute them."""
        with torch.no_grad():
            return BaseModel.extract_features(self._policy, observations, self._policy.pi_features_extractor)

    def get_distribution(self, observations: PyTorchObs, action_masks: Any = None) -> Distribution:
        """π(·|s), in the policy's own object; `gradient` goes on where its graph ends, until the next call."""
        y = self._outputs(self._network("actor", self.features(observations)), self.log_std)
        distribution: Any = self._policy.action_dist
        if self.log_std is None:
            distribution.proba_distribution(action_logits=y)
        else:
            distribution.proba_distribution(y, self._leaves[self.log_std])
        if action_masks is not None:
            distribution.apply_masking(action_masks)
        return distribution

    def values(self, features: Tensor) -> Tensor:
        """V(s) of features, ``(N,)``, or Q(s,·), ``(N, K)``, likewise."""
        values = self._outputs(self._network("critic", features))
        return values if self.has_action_values else values.flatten()

    def _outputs(self, network: Perceptron, *others: nn.Parameter | None) -> Tensor:
        """Outputs of a network, a leaf like the parameters beside it: no graph of ours holds the parameters."""
        tracked = torch.is_grad_enabled()
        y = network.forward().clone().requires_grad_(tracked)
        self._leaves = {
            param: param.detach().requires_grad_(tracked and param.requires_grad)
            for param in others
            if param is not None
        }
        self._last = network, y
        return y

    def gradient(self, terms: Iterable[Tensor]) -> dict[nn.Parameter, Tensor]:
        """Gradient of a sum of scalars, each of what was asked last when it is come by; see `parameters.gradient`."""
        total: dict[nn.Parameter, Tensor] = {}
        for term in terms:
            network, y = self._last
            leaves = {param: leaf for param, leaf in self._leaves.items() if leaf.requires_grad}
            u, *others = torch.autograd.grad(term, [y, *leaves.values()], materialize_grads=True)
            network.u.copy_(u)
            network.pullback()
            for param, share in {**network.gradient, **dict(zip(leaves, others, strict=True))}.items():
                total[param] = total[param] + share if param in total else share.clone()
        return {param: total[param] for param in self.parameters() if param in total}

    def actor_jacobian(self, observations: PyTorchObs, params: Sequence[nn.Parameter]) -> Jacobian:
        """That of means and log σ, or of logits, at the parameters as they are; to be used in the present update."""
        return self._jacobian("actor", self.features(observations), params, log_std=self.log_std)

    def critic_jacobian(self, features: Tensor, params: Sequence[nn.Parameter], actions: Tensor) -> Jacobian:
        """That of V, or of Q(s,a) of the actions taken, ``(N,)``, likewise."""
        if self.has_action_values:
            return JacobianOfTaken(self._jacobian("critic", features, params), actions, self.family.sizes[0])
        return self._jacobian("critic", features, params, is_scalar=True)

    def _jacobian(self, name: str, x: Tensor, params: Sequence[nn.Parameter], **options: Any) -> Jacobian:
        """That of a network which is nobody else's, until nobody holds the Jacobian any more."""
        returned = self._returned.setdefault((name, len(x)), [])
        network = returned.pop() if returned else self._new_network(name, x)
        network.x.copy_(x)
        jacobian = PerceptronJacobian(network, params, **options)
        finalize(jacobian, returned.append, network).atexit = False
        return jacobian

    def _network(self, name: str, x: Tensor) -> Perceptron:
        """The network for so many rows, the same for all, with given inputs."""
        key = name, len(x)
        if key not in self._networks:
            self._networks[key] = self._new_network(name, x)
        self._networks[key].x.copy_(x)
        return self._networks[key]

    def _new_network(self, name: str, x: Tensor) -> Perceptron:
        modules = self.actor_modules if name == "actor" else self.critic_modules
        return Perceptron(modules, torch.empty_like(x, memory_format=torch.contiguous_format))


class JacobianOfTaken:
    """The rows of a Jacobian of Q(s,·) that belong to the actions taken.

    Args:
        jacobian: That of all actions.
        actions: Those taken, ``(N,)``.
        n_actions: K.
    """

    def __init__(self, jacobian: Jacobian, actions: Tensor, n_actions: int) -> None:
        self._jacobian, self._taken, self._n_actions = jacobian, actions.long().view(-1, 1), n_actions

    def jvp(self, vector: Tensor) -> Tensor:
        """J v: ``(P,)`` -> ``(N,)``."""
        return of_taken(self._jacobian.jvp(vector), self._taken)

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Jᵀ w: ``(N,)`` -> ``(P,)``."""
        of_all = cotangent.new_zeros(len(cotangent), self._n_actions)
        return self._jacobian.vjp(of_all.scatter_(1, self._taken, cotangent.unsqueeze(1)))


class PerceptronJacobian:
    """J = ∂z/∂θ as products in both directions, z = y, (y, log σ) or, if scalar, the numbers of a single column.

    Args:
        network: At θ; nobody else's.
        params: θ, P numbers in all.
        log_std: log σ, the same for all rows, which need not be one of θ; None for none.
        is_scalar: Whether z has no axis of columns.
    """

    def __init__(
        self,
        network: Perceptron,
        params: Sequence[nn.Parameter],
        *,
        log_std: nn.Parameter | None = None,
        is_scalar: bool = False,
    ) -> None:
        self._network, self._params, self._log_std, self._is_scalar = network, list(params), log_std, is_scalar
        network.forward()

    def jvp(self, vector: Tensor) -> Tensor:
        """J v: ``(P,)`` -> ``(N, K)``."""
        tangent = dict(zip(self._params, unflatten(vector, self._params), strict=True))
        image = self._network.pushforward(tangent)
        if self._log_std is not None:
            spread = tangent.get(self._log_std)
            return torch.cat([image, torch.zeros_like(image) if spread is None else spread.expand_as(image)], dim=1)
        return image.flatten() if self._is_scalar else image

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Jᵀ w: ``(N, K)`` -> ``(P,)``."""
        network = self._network
        columns = network.u.shape[1]
        network.u.copy_(cotangent.view(len(cotangent), -1)[:, :columns])
        network.pullback()
        pieces = dict(network.gradient)
        if self._log_std is not None:
            pieces[self._log_std] = cotangent[:, columns:].sum(dim=0)
        return flatten([pieces[param] for param in self._params])
