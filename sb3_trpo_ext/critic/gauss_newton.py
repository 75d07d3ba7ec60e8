"""The value function by damped Gauss-Newton steps, without a learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sb3_trpo_ext.core.arguments import check_integer, check_number, check_samples
from sb3_trpo_ext.core.curvature import GaussNewtonProduct, Jacobian, Metric
from sb3_trpo_ext.core.natural_step import Acceptance, TrustRegion, backtrack, natural_direction
from sb3_trpo_ext.core.parameters import flatten
from sb3_trpo_ext.critic.base import ONE_ROLLOUT, Critic, Regression, ValueFunction, check_decay
from sb3_trpo_ext.rollout.batch import Batch, fits


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
        n_iterations: Gauss-Newton steps a rollout.
        max_backtracks: Most halvings of a step.
        curvature_samples: Most samples that the matrix E[∇V ∇Vᵀ] is estimated from; None for all, ``"auto"`` for as
            many as the model's Fisher matrix.
        n_steps: What ``n_iterations`` was called before; None for that.
        n_rollouts: M: V is fitted on the samples of the last M rollouts, each with the same weight. The newest keeps
            its λ-returns; those before it have the targets of V-trace (`trace_targets`; Espeholt et al. 2018) for the
            policy and the V of the moment of the fit, with what follows a time limit as it was valued when that was
            reached. Observations and rewards keep the normalisation that they had. The model keeps the M - 1 rollouts
            before the newest by reference, and joins copies of all M while it fits: memory for 2M rollouts at most.
            They are forgotten with the policy or the environment that they belong to, and not saved with the model.
        gae_lambda: λ in [0, 1] of the returns R, where that of the advantages is another: the gradient has less noise
            with a smaller λ, at the cost of V's error, and V less error with a larger one, which sees rewards further
            away. None for the model's ``gae_lambda``. ``rollout_buffer.returns`` has them when a rollout ends, before a
            callback hears of it; what that writes there is what V is fitted to.
    """

    def __init__(
        self,
        *,
        damping: float = 0.01,
        cg_steps: int = 8,
        n_iterations: int = 1,
        max_backtracks: int = 20,
        curvature_samples: int | Literal["auto"] | None = "auto",
        n_steps: int | None = None,
        n_rollouts: int = 1,
        gae_lambda: float | None = None,
    ) -> None:
        given = {"cg_steps": cg_steps, "n_iterations": n_iterations, "max_backtracks": max_backtracks}
        if n_steps is not None:
            given["n_steps"] = n_steps
        for name, value in given.items():
            check_integer(f"critic_kwargs['{name}']", value)
        check_integer("critic_kwargs['n_rollouts']", n_rollouts, hint=ONE_ROLLOUT)
        check_number("critic_kwargs['damping']", damping, positive=True)
        check_decay(gae_lambda)
        if curvature_samples != "auto":
            check_samples("critic_kwargs['curvature_samples']", curvature_samples)
        self.damping = damping
        self.cg_steps = cg_steps
        self.n_iterations = n_iterations if n_steps is None else n_steps
        self.max_backtracks = max_backtracks
        self.n_rollouts = n_rollouts
        self.gae_lambda = gae_lambda
        self.curvature_samples = curvature_samples

    def fit(self, regression: Regression) -> float:
        """Take the steps; see `Critic.fit`."""
        values, size = ValueFunction(regression, by_hand=True), regression.chunk_size
        samples = regression.curvature_samples if self.curvature_samples == "auto" else self.curvature_samples
        worth = self.cg_steps * sum(param.numel() * param.element_size() for param in values.params)
        subset, loss = values.batch.subset(samples, worth), 0.0
        for _ in range(self.n_iterations):
            loss = self._step(ValueProblem(values, size, subset))
        return 2.0 * loss

    def _step(self, problem: ValueProblem) -> float:
        """One Gauss-Newton step; returns the value loss afterwards, the same if no step lowers it."""
        if not problem.params:
            return problem.start.loss
        direction = natural_direction(
            problem.curvature(self.damping), problem, max_steps=self.cg_steps, reduction=problem.reduction
        )
        test = Acceptance(TrustRegion(), problem.start, expected=direction.slope)
        step = backtrack(problem, direction, 1.0, test.rejection, shrink=0.5, max_steps=self.max_backtracks)
        return step.evaluation.loss


@dataclass(frozen=True)
class ValueEvaluation:
    """V on the whole batch.

    Attributes:
        loss: ½ E[(V(s) - R)²].
        divergence: 0: the fit has nothing to bound.
    """

    loss: float
    divergence: float = 0.0

    @property
    def objective(self) -> float:
        """Minus the loss."""
        return -self.loss


class ValueProblem:
    """Minimise ½ E[(V(s) - R)²] around the parameters with which it was made.

    Args:
        values: V.
        chunk_size: Most samples in one forward pass; None for all at once.
        curvature_batch: The samples that the Gauss-Newton matrix is estimated from; None for all.

    Attributes:
        start: The evaluation at θ_old.
        params: The parameters that may move and that V reaches.
        theta_old: Their values, ``(P,)``.
        gradient: E[(R - V) ∇V], ``(P,)``: that of minus the loss.
        reduction: That of the samples.
    """

    def __init__(
        self, values: ValueFunction, chunk_size: int | None = None, curvature_batch: Batch | None = None
    ) -> None:
        self._values, self.reduction, self._chunk_size = values, values.batch.reduction, chunk_size
        self._chunks = values.batch.split(chunk_size)
        self._seen = values.batch if curvature_batch is None else curvature_batch
        losses = list[Tensor]()

        def objectives() -> Iterator[Tensor]:
            for chunk in self._chunks:
                loss = self._loss(chunk, values(chunk))
                losses.append(loss.detach())
                yield -loss

        shares = values.gradient(objectives())
        self.params = list(shares)
        self.theta_old = flatten(self.params).detach()
        totals, self.start = self._summary(losses, list(shares.values()))
        self.gradient = flatten(totals)

    @torch.no_grad()
    def evaluate(self) -> ValueEvaluation:
        """The loss with the parameters as they are now."""
        return self._summary([self._loss(chunk, self._values(chunk)) for chunk in self._chunks])[1]

    def curvature(self, damping: float) -> GaussNewtonProduct:
        """Products v ↦ (E[∇V ∇Vᵀ] + λI) v at the parameters as they are now."""

        def segment(chunk: Batch) -> tuple[Jacobian, Metric]:
            return self._values.jacobian(chunk, self.params), lambda v: chunk.weights * v

        chunks = self._seen.split(self._chunk_size)
        segments = [partial(segment, chunk) for chunk in chunks]
        keep = fits(chunks, self._chunk_size)
        return GaussNewtonProduct(segments, damping, keep=keep, reduction=self._seen.reduction)

    @staticmethod
    def _loss(batch: Batch, values: Tensor) -> Tensor:
        return batch.mean(0.5 * (values - batch.returns).square())

    def _summary(self, losses: list[Tensor], gradients: Sequence[Tensor] = ()) -> tuple[list[Tensor], ValueEvaluation]:
        """Totals of gradients, and the evaluation, in one exchange."""
        loss = torch.stack(losses).sum()[None]
        totals, loss, _ = self.reduction.totals(gradients, loss, loss[:0])
        return totals, ValueEvaluation(float(loss))
