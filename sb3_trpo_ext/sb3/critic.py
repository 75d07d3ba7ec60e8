"""The value-function fits. None of them moves a parameter that the policy's output reaches."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn
from torch.nn import functional as F

from sb3_trpo_ext.core.conjugate_gradient import conjugate_gradient
from sb3_trpo_ext.core.curvature import GaussNewtonProduct, Metric, Segment
from sb3_trpo_ext.core.trust_region import Acceptance, Checkpoint, backtracking_line_search
from sb3_trpo_ext.core.vectors import assign, flatten
from sb3_trpo_ext.sb3.batch import Batch
from sb3_trpo_ext.sb3.checks import check_integer, check_number
from sb3_trpo_ext.sb3.parameters import gradient, trainable


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
        chunk_size: Most samples in one forward pass; None for all at once.
    """

    def __init__(
        self,
        *,
        damping: float = 0.01,
        cg_steps: int = 10,
        n_steps: int = 3,
        max_backtracks: int = 20,
        chunk_size: int | None = None,
    ) -> None:
        for name, value in (("cg_steps", cg_steps), ("n_steps", n_steps), ("max_backtracks", max_backtracks)):
            check_integer(f"critic_kwargs['{name}']", value)
        check_number("critic_kwargs['damping']", damping, positive=True)
        self.damping = damping
        self.cg_steps = cg_steps
        self.n_steps = n_steps
        self.max_backtracks = max_backtracks
        self.chunk_size = chunk_size

    def fit(self, policy: ActorCriticPolicy, batch: Batch, frozen: AbstractSet[nn.Parameter]) -> float:
        """Take the steps; see `Critic.fit`."""
        problem = ValueProblem(policy, batch.split(self.chunk_size))
        loss = -problem.evaluate().objective
        candidates = [param for param in trainable(policy) if param not in frozen]
        for _ in range(self.n_steps):
            loss = self._step(problem, candidates, loss)
        return 2.0 * loss

    def _step(self, problem: ValueProblem, candidates: Sequence[nn.Parameter], loss: float) -> float:
        """One Gauss-Newton step from a value loss; returns the loss afterwards, the same if no step lowers it."""
        descent = problem.descent_direction(candidates)
        if not descent:
            return loss
        params, g = list(descent), flatten(list(descent.values()))
        solution = conjugate_gradient(problem.curvature(params, self.damping), g, max_steps=self.cg_steps).solution
        start = flatten(params).detach()
        checkpoint = Checkpoint(params)

        def trial_at(fraction: float) -> ValueTrial:
            assign(params, start + fraction * solution)
            return problem.evaluate()

        acceptance = Acceptance(start=-loss, radius=math.inf, expected=float(g.dot(solution)))
        result = backtracking_line_search(trial_at, acceptance, shrink=0.5, max_steps=self.max_backtracks)
        if result.trial is None:
            checkpoint.restore()
            return loss
        return -result.trial.objective


class ValueProblem:
    """Minimise ½ E[(V(s) - R)²] over the parts of a batch."""

    def __init__(self, policy: ActorCriticPolicy, chunks: Sequence[Batch]) -> None:
        self._policy = policy
        self._chunks = chunks
        self._graph: Tensor | None = None

    def _values(self, batch: Batch) -> Tensor:
        return self._policy.predict_values(batch.observations).flatten()

    @torch.no_grad()
    def evaluate(self) -> ValueTrial:
        """The loss with the parameters as they are now."""
        return ValueTrial(-sum(float(self._loss(chunk, self._values(chunk))) for chunk in self._chunks))

    def _loss(self, batch: Batch, values: Tensor) -> Tensor:
        return batch.mean(0.5 * (values - batch.returns).square())

    def descent_direction(self, candidates: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        """E[(R - V) ∇V] for the candidates that V reaches."""
        return gradient((-self._remembered_loss(chunk) for chunk in self._chunks), candidates)

    def _remembered_loss(self, batch: Batch) -> Tensor:
        values = self._values(batch)
        self._graph = values if len(self._chunks) == 1 else None
        return self._loss(batch, values)

    def curvature(self, params: Sequence[nn.Parameter], damping: float) -> GaussNewtonProduct:
        """Products v ↦ (E[∇V ∇Vᵀ] + λI) v."""
        graph = self._graph

        def segment(chunk: Batch) -> Segment:
            return lambda: (self._values(chunk) if graph is None else graph, _weighting(chunk))

        return GaussNewtonProduct([segment(chunk) for chunk in self._chunks], params, damping)


def _weighting(batch: Batch) -> Metric:
    return lambda v: batch.weights * v


class AdamCritic(Critic):
    """Minibatch regression with the policy's optimiser, as in sb3-contrib.

    Args:
        buffer: The full rollout buffer.
        batch_size: Samples in a minibatch.
        n_updates: Epochs.
    """

    def __init__(self, buffer: RolloutBuffer, *, batch_size: int, n_updates: int) -> None:
        self._buffer = buffer
        self._batch_size = batch_size
        self._n_updates = n_updates

    def fit(self, policy: ActorCriticPolicy, batch: Batch, frozen: AbstractSet[nn.Parameter]) -> float:
        """Run the epochs; the returned error is the mean over minibatches, each before its step."""
        params = [param for param in trainable(policy) if param not in frozen]
        losses = []
        for _ in range(self._n_updates):
            for data in self._buffer.get(self._batch_size):
                loss = F.mse_loss(data.returns.flatten(), policy.predict_values(data.observations).flatten())
                policy.optimizer.zero_grad()
                for param, grad in gradient([loss], params).items():
                    param.grad = grad
                policy.optimizer.step()
                losses.append(loss.item())
        policy.optimizer.zero_grad()
        return float(np.mean(losses))
