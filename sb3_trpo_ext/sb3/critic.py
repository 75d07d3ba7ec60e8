"""The value-function fits. None of them moves a parameter that the policy's output reaches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy, BaseModel
from torch import Tensor, nn

from sb3_trpo_ext.core.curvature import GaussNewtonProduct, Metric
from sb3_trpo_ext.core.natural_step import Acceptance, TrustRegion, backtrack, natural_direction
from sb3_trpo_ext.core.vectors import flatten
from sb3_trpo_ext.sb3.batch import Batch, fits
from sb3_trpo_ext.sb3.checks import check_integer, check_number, check_samples
from sb3_trpo_ext.sb3.device import MEMORY_BUDGET
from sb3_trpo_ext.sb3.methods import owner_of
from sb3_trpo_ext.sb3.optimizer import FlatOptimizer
from sb3_trpo_ext.sb3.parameters import gradient, trainable

KNOWN_VALUES = (ActorCriticPolicy, MaskableActorCriticPolicy)
"""Policies whose V goes from the critic's features through its MLP."""


@dataclass(frozen=True)
class Regression:
    """What a critic is asked to do: fit V(s) to the returns R of one rollout.

    Attributes:
        policy: The policy; ``policy.optimizer`` has the learning rate in force.
        batch: The samples of the rollout.
        frozen: Parameters that must stay as they are: the actor's.
        minibatches: One epoch of minibatches of `batch`, or of that with other observations.
        epochs: The model's ``n_critic_updates``.
        curvature_samples: The model's, or None.
        chunk_size: Most samples in one forward pass; None for all at once.
        minibatches_are_parts: Whether they are cut from what they are given; a buffer of the user's deals out its own.
    """

    policy: ActorCriticPolicy
    batch: Batch
    frozen: AbstractSet[nn.Parameter] = frozenset()
    minibatches: Callable[[Batch], Iterator[Batch]] = lambda batch: iter([batch])
    epochs: int = 1
    curvature_samples: int | None = None
    chunk_size: int | None = None
    minibatches_are_parts: bool = True


class Critic(ABC):
    """Fits V(s) to the returns of one rollout after the other.

    A model makes one, from its ``critic`` and ``critic_kwargs``, and keeps it. What `state_dict` returns is saved and
    loaded with the model, and restored when an update is undone.
    """

    @abstractmethod
    def fit(self, regression: Regression) -> float:
        """Fit V, leaving the frozen parameters as they are.

        Returns:
            The mean squared error E[(V(s) - R)²].
        """

    def state_dict(self) -> dict[str, Any]:
        """What the critic has learnt beside the policy's parameters; empty for one without state."""
        return {}

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Take over what `state_dict` returned."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state, got {', '.join(state)}.")


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
    ) -> None:
        given = {"cg_steps": cg_steps, "n_iterations": n_iterations, "max_backtracks": max_backtracks}
        if n_steps is not None:
            given["n_steps"] = n_steps
        for name, value in given.items():
            check_integer(f"critic_kwargs['{name}']", value)
        check_number("critic_kwargs['damping']", damping, positive=True)
        if curvature_samples != "auto":
            check_samples("critic_kwargs['curvature_samples']", curvature_samples)
        self.damping = damping
        self.cg_steps = cg_steps
        self.n_iterations = n_iterations if n_steps is None else n_steps
        self.max_backtracks = max_backtracks
        self.curvature_samples = curvature_samples

    def fit(self, regression: Regression) -> float:
        """Take the steps; see `Critic.fit`."""
        values, size = ValueFunction(regression), regression.chunk_size
        samples = regression.curvature_samples if self.curvature_samples == "auto" else self.curvature_samples
        subset, loss = values.batch.subset(samples), 0.0
        for _ in range(self.n_iterations):
            loss = self._step(ValueProblem(values, size, subset))
        return 2.0 * loss

    def _step(self, problem: ValueProblem) -> float:
        """One Gauss-Newton step; returns the value loss afterwards, the same if no step lowers it."""
        if not problem.params:
            return problem.start.loss
        direction = natural_direction(problem.curvature(self.damping), problem, max_steps=self.cg_steps)
        test = Acceptance(TrustRegion(), problem.start, expected=direction.slope)
        step = backtrack(problem, direction, 1.0, test.rejection, shrink=0.5, max_steps=self.max_backtracks)
        return step.evaluation.loss


class ValueFunction:
    """V(s) on (parts of) a batch, its features computed once where the fit leaves the extractor alone.

    Args:
        regression: Whose policy, samples and parameters.
        keep_features: Whether features may be kept at all.

    Attributes:
        params: The parameters that it may move.
        batch: The samples, with features in place of observations if they are fixed.
    """

    def __init__(self, regression: Regression, *, keep_features: bool = True) -> None:
        self._policy = policy = regression.policy
        self._plain: Any = owner_of(policy, "predict_values", KNOWN_VALUES)
        self.params = [param for param in trainable(policy) if param not in regression.frozen]
        self.batch = regression.batch
        self._fixed = keep_features and self._has_fixed_features(len(self.batch))
        if self._fixed:
            self.batch = replace(self.batch, observations=self._features(self.batch, regression.chunk_size))

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
    """

    def __init__(
        self, values: ValueFunction, chunk_size: int | None = None, curvature_batch: Batch | None = None
    ) -> None:
        self._values, self._reduction, self._chunk_size = values, values.batch.reduction, chunk_size
        self._chunks = values.batch.split(chunk_size)
        self._seen = values.batch if curvature_batch is None else curvature_batch
        self._graphs: list[Tensor] = []
        keep, losses = self._seen is values.batch and fits(self._chunks, chunk_size), list[Tensor]()

        def objectives() -> Iterator[Tensor]:
            for chunk in self._chunks:
                predicted = values(chunk)
                if keep:
                    self._graphs.append(predicted)
                loss = self._loss(chunk, predicted)
                losses.append(loss.detach())
                yield -loss

        shares = gradient(objectives(), values.params, retain_graph=keep)
        self.start = self._summary(losses)
        self.params = list(shares)
        self.theta_old = flatten(self.params).detach()
        self.gradient = flatten(self._reduction.gradients(list(shares.values())))

    @torch.no_grad()
    def evaluate(self) -> ValueEvaluation:
        """The loss with the parameters as they are now."""
        self._graphs = []  # those of θ_old, which has been left
        return self._summary([self._loss(chunk, self._values(chunk)) for chunk in self._chunks])

    def curvature(self, damping: float) -> GaussNewtonProduct:
        """Products v ↦ (E[∇V ∇Vᵀ] + λI) v."""
        graphs = self._graphs
        chunks = self._chunks if graphs else self._seen.split(self._chunk_size)

        def segment(index: int) -> tuple[Tensor, Metric]:
            return graphs[index] if graphs else self._values(chunks[index]), _weighting(chunks[index])

        segments = [partial(segment, index) for index in range(len(chunks))]
        return GaussNewtonProduct(segments, self.params, damping, keep=fits(chunks, self._chunk_size))

    @staticmethod
    def _loss(batch: Batch, values: Tensor) -> Tensor:
        return batch.mean(0.5 * (values - batch.returns).square())

    def _summary(self, losses: list[Tensor]) -> ValueEvaluation:
        return ValueEvaluation(self._reduction.number(torch.stack(losses).sum()))


def _weighting(batch: Batch) -> Metric:
    return lambda v: batch.weights * v


class AdamCritic(Critic):
    """Minibatch regression with the policy's optimiser, as in sb3-contrib.

    Torch's Adam runs on one flat vector, as one fused kernel where torch has one. Its settings are the model's own
    arguments ``learning_rate``, ``batch_size`` and ``n_critic_updates``; its state is the optimiser's, which the model
    keeps.
    """

    def fit(self, regression: Regression) -> float:
        """Run the epochs; the returned error is the mean over minibatches, each before its step."""
        values = ValueFunction(regression, keep_features=regression.minibatches_are_parts)
        policy, losses = regression.policy, []
        with FlatOptimizer(policy.optimizer, policy, regression.frozen, fused=True) as optimizer:
            for _ in range(regression.epochs):
                for part in regression.minibatches(values.batch):
                    loss = part.reduction.mean((part.returns - values(part)).square())
                    optimizer.descend(loss, reduction=part.reduction)
                    losses.append(loss.detach())
        return regression.batch.reduction.number(torch.stack(losses).sum() / len(losses))


_CRITICS: dict[str, type[Critic]] = {"gauss_newton": GaussNewtonCritic, "adam": AdamCritic}


def register_critic(name: str, critic_class: type[Critic]) -> None:
    """Make a critic known by a name: ``TRPO(..., critic=name, critic_kwargs={...})`` then makes one of ``**kwargs``.

    Args:
        name: The name; one that is known already is given to another class.
        critic_class: A subclass of `Critic`, whose constructor takes ``critic_kwargs``.

    Raises:
        TypeError: If it is no such class.
    """
    if not (isinstance(critic_class, type) and issubclass(critic_class, Critic)):
        raise TypeError(f"`critic_class` must be a subclass of sb3_trpo_ext.Critic, got {critic_class!r}.")
    _CRITICS[name] = critic_class


def make_critic(critic: str | type[Critic], kwargs: dict[str, Any]) -> Critic:
    """The critic of a registered name, or of a class, made with its arguments.

    Raises:
        ValueError: If the name is not known, or the arguments are not the critic's.
    """
    kind = _CRITICS.get(critic) if isinstance(critic, str) else critic
    if not (isinstance(kind, type) and issubclass(kind, Critic)):
        names = ", ".join(map(repr, ("auto", *_CRITICS)))
        raise ValueError(f"`critic` must be one of {names}, or a subclass of sb3_trpo_ext.Critic, got {critic!r}.")
    try:
        return kind(**kwargs)
    except TypeError as error:
        of_adam = (
            " The Adam critic has none: use `learning_rate`, `batch_size` and `n_critic_updates`, or pass "
            "critic='gauss_newton'."
        )
        raise ValueError(
            f"`critic_kwargs` must be arguments of {kind.__name__}, got {kwargs!r} with critic={critic!r}: {error}."
            + of_adam * (kind is AdamCritic)
        ) from error
