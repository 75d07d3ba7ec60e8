"""The value-function fits. None of them moves a parameter that the policy's output reaches."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy, BaseModel
from torch import Tensor, nn
from torch.nn import functional as F

from sb3_trpo_ext.core.conjugate_gradient import conjugate_gradient
from sb3_trpo_ext.core.curvature import GaussNewtonProduct, Metric, Segment
from sb3_trpo_ext.core.trust_region import Acceptance, Checkpoint, backtracking_line_search
from sb3_trpo_ext.core.vectors import assign, flatten
from sb3_trpo_ext.sb3.batch import Batch
from sb3_trpo_ext.sb3.buffers import VIEWED_BUFFERS, minibatches
from sb3_trpo_ext.sb3.checks import check_integer, check_number, check_samples
from sb3_trpo_ext.sb3.device import MEMORY_BUDGET, check_interval
from sb3_trpo_ext.sb3.methods import owner_of
from sb3_trpo_ext.sb3.optimizer import FlatOptimizer
from sb3_trpo_ext.sb3.parameters import gradient, trainable

KNOWN_VALUES = (ActorCriticPolicy, MaskableActorCriticPolicy)
"""Policies whose V goes from the critic's features through its MLP."""


class Critic(ABC):
    """Fits V(s) to the returns of one rollout."""

    @abstractmethod
    def fit(self, policy: ActorCriticPolicy, batch: Batch, frozen: AbstractSet[nn.Parameter]) -> float:
        """Fit V, leaving the ``frozen`` parameters (the actor's) as they are.

        Returns:
            The mean squared error E[(V(s) - R)²].
        """


@dataclass(frozen=True)
class ValueTrial:
    """Minus the value loss at a trial point; the fit has no divergence to bound."""

    objective: float
    divergence: float = 0.0


class GaussNewtonCritic(Critic):
    """Damped Gauss-Newton steps on ½ E[(V(s) - R)²] by conjugate gradients: no learning rate.

    One step solves (E[∇V ∇Vᵀ] + λI) d = E[(R - V) ∇V] and backtracks along d until the loss falls. As V enters the
    loss quadratically, the curvature is the metric "1" of the outputs, and the same matrix-free product serves as for
    the policy. The matrix depends on the features alone, so λ needs no tuning to the scale of the returns.

    Source: Schulman et al. (2016), "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    section 5, with damping in place of the trust region on V and a line search added.

    Args:
        damping: λ > 0.
        cg_steps: Most products a step.
        n_steps: Gauss-Newton steps a rollout.
        max_backtracks: Most halvings of a step.
        curvature_samples: Most samples that the matrix E[∇V ∇Vᵀ] is estimated from; None for all.
        chunk_size: Most samples in one forward pass; None for all at once.
    """

    def __init__(
        self,
        *,
        damping: float = 0.01,
        cg_steps: int = 8,
        n_steps: int = 1,
        max_backtracks: int = 20,
        curvature_samples: int | None = None,
        chunk_size: int | None = None,
    ) -> None:
        for name, value in (("cg_steps", cg_steps), ("n_steps", n_steps), ("max_backtracks", max_backtracks)):
            check_integer(f"critic_kwargs['{name}']", value)
        check_number("critic_kwargs['damping']", damping, positive=True)
        check_samples("critic_kwargs['curvature_samples']", curvature_samples)
        self.damping = damping
        self.cg_steps = cg_steps
        self.n_steps = n_steps
        self.max_backtracks = max_backtracks
        self.curvature_samples = curvature_samples
        self.chunk_size = chunk_size

    def fit(self, policy: ActorCriticPolicy, batch: Batch, frozen: AbstractSet[nn.Parameter]) -> float:
        """Take the steps; see `Critic.fit`."""
        values = ValueFunction(policy, batch, frozen, self.chunk_size)
        problem = ValueProblem(values, chunk_size=self.chunk_size, curvature_samples=self.curvature_samples)
        loss = -problem.evaluate().objective
        for _ in range(self.n_steps):
            loss = self._step(problem, loss)
        return 2.0 * loss

    def _step(self, problem: ValueProblem, loss: float) -> float:
        """One Gauss-Newton step from a value loss; returns the loss afterwards, the same if no step lowers it."""
        descent = problem.descent_direction()
        if not descent:
            return loss
        params, g = list(descent), flatten(list(descent.values()))
        solution = conjugate_gradient(
            problem.curvature(params, self.damping), g, max_steps=self.cg_steps, check_every=check_interval(g)
        ).solution
        start = flatten(params).detach()
        checkpoint = Checkpoint(params)

        def trial_at(fraction: float) -> ValueTrial:
            assign(params, start + fraction * solution)
            return problem.evaluate()

        acceptance = Acceptance(start=-loss, radius=math.inf, expected=float(g.dot(solution)))
        result = backtracking_line_search(trial_at, acceptance, shrink=0.5, max_steps=self.max_backtracks)
        if result.trial is None:
            checkpoint.restore()
            problem.forget()
            return loss
        return -result.trial.objective


class ValueFunction:
    """V(s) on (parts of) a batch, its features computed once where the fit leaves the extractor alone.

    Args:
        policy: The policy.
        batch: The samples.
        frozen: Parameters that the fit must not move.
        chunk_size: Most samples in one forward pass of the extractor; None for all at once.
        keep_features: Whether features may be kept at all.

    Attributes:
        params: The parameters that it may move.
        batch: The samples, with features in place of observations if they are fixed.
    """

    def __init__(
        self,
        policy: ActorCriticPolicy,
        batch: Batch,
        frozen: AbstractSet[nn.Parameter],
        chunk_size: int | None,
        *,
        keep_features: bool = True,
    ) -> None:
        self._policy = policy
        self._plain: Any = owner_of(policy, "predict_values", KNOWN_VALUES)
        self.params = [param for param in trainable(policy) if param not in frozen]
        self._fixed = keep_features and self._has_fixed_features(len(batch))
        self.batch = replace(batch, observations=self._features(batch, chunk_size)) if self._fixed else batch

    def __call__(self, batch: Batch) -> Tensor:
        """V on a part of `batch`, ``(N,)``."""
        if not self._fixed:
            return batch.values(self._policy)
        features = batch.inputs
        assert isinstance(features, Tensor)
        values: Tensor = self._plain.value_net(self._plain.mlp_extractor.forward_critic(features))
        return values.flatten()

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


class ValueProblem:
    """Minimise ½ E[(V(s) - R)²] over a batch that is visited in chunks.

    Args:
        values: V and its samples.
        chunk_size: Most samples in one forward pass; None for all at once.
        curvature_samples: Most samples that the Gauss-Newton matrix is estimated from; None for all.
    """

    def __init__(
        self, values: ValueFunction, *, chunk_size: int | None = None, curvature_samples: int | None = None
    ) -> None:
        self._values = values
        self._chunks = values.batch.split(chunk_size)
        subset = values.batch if curvature_samples is None else values.batch.subset(curvature_samples)
        self._curvature_chunks = self._chunks if subset is values.batch else subset.split(chunk_size)
        self._graph: Tensor | None = None

    def evaluate(self) -> ValueTrial:
        """The loss with the parameters as they are now; in a single chunk, V's graph is kept for what follows."""
        if len(self._chunks) > 1:
            return ValueTrial(-self._loss_of_chunks())
        values = self._values(self._chunks[0])
        self._graph = values if values.requires_grad else None
        return ValueTrial(-float(self._loss(self._chunks[0], values.detach())))

    @torch.no_grad()
    def _loss_of_chunks(self) -> float:
        return float(torch.stack([self._loss(chunk, self._values(chunk)) for chunk in self._chunks]).sum())

    def forget(self) -> None:
        """Drop the graph: the parameters were put back without an evaluation."""
        self._graph = None

    def _loss(self, batch: Batch, values: Tensor) -> Tensor:
        return batch.mean(0.5 * (values - batch.returns).square())

    def descent_direction(self) -> dict[nn.Parameter, Tensor]:
        """E[(R - V) ∇V] for the parameters that may move and that V reaches."""
        if self._graph is not None:
            return gradient([-self._loss(self._chunks[0], self._graph)], self._values.params, retain_graph=True)
        return gradient((-self._loss(chunk, self._values(chunk)) for chunk in self._chunks), self._values.params)

    def curvature(self, params: Sequence[nn.Parameter], damping: float) -> GaussNewtonProduct:
        """Products v ↦ (E[∇V ∇Vᵀ] + λI) v."""
        graph = self._graph if self._curvature_chunks is self._chunks else None

        def segment(chunk: Batch) -> Segment:
            return lambda: (self._values(chunk) if graph is None else graph, _weighting(chunk))

        return GaussNewtonProduct([segment(chunk) for chunk in self._curvature_chunks], params, damping)


def _weighting(batch: Batch) -> Metric:
    return lambda v: batch.weights * v


class AdamCritic(Critic):
    """Minibatch regression with the policy's optimiser, as in sb3-contrib.

    Torch's Adam runs on one flat vector, as one fused kernel where torch has one.

    Args:
        buffer: The full rollout buffer.
        action_space: Its action space.
        batch_size: Samples in a minibatch.
        n_updates: Epochs.
        chunk_size: Most samples in one forward pass of a features extractor that is not to be moved.
    """

    def __init__(
        self,
        buffer: RolloutBuffer,
        action_space: spaces.Space,
        *,
        batch_size: int,
        n_updates: int,
        chunk_size: int | None = None,
    ) -> None:
        self._buffer = buffer
        self._action_space = action_space
        self._batch_size = batch_size
        self._n_updates = n_updates
        self._chunk_size = chunk_size

    def fit(self, policy: ActorCriticPolicy, batch: Batch, frozen: AbstractSet[nn.Parameter]) -> float:
        """Run the epochs; the returned error is the mean over minibatches, each before its step."""
        viewed = type(self._buffer) in VIEWED_BUFFERS
        values = ValueFunction(policy, batch, frozen, self._chunk_size, keep_features=viewed)
        losses = []
        with FlatOptimizer(policy.optimizer, policy, frozen, fused=True) as optimizer:
            for _ in range(self._n_updates):
                for part in minibatches(self._buffer, values.batch, self._batch_size, self._action_space):
                    loss = F.mse_loss(part.returns, values(part))
                    optimizer.descend(loss)
                    losses.append(loss.detach())
        return float(torch.stack(losses).mean())
