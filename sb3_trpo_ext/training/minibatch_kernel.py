"""Epochs of minibatches without autograd: the losses of PPO, their gradients and Adam, on flat vectors.

For policies of plain layers. With n samples in a minibatch, means over them, r = π_θ(a|s)/π_old(a|s), V' = V or V
clipped around V_old, D = KL(π_old‖π_θ) and y the policy's outputs (means or logits), the loss is

    E[ℓ(s, a)] + c_v E[(R - V')²] - c_e E[H],   ℓ = -min(r Â, clip(r, 1-ε, 1+ε) Â)   (Schulman et al. 2017, equation 7)
                                                or ℓ = β D - r Â                    (equation 8)

and its gradient, where J is the Jacobian of y or V in the parameters,

    Jᵀu with u = (c ∇_y log π + β ∇_y D - c_e ∇_y H) / n,   c = -r Â, or 0 where the minimum is the clipped constant,
    Jᵀu with u = 2 c_v (V' - R) / n, or 0 where V' is the clipped constant.

    Gaussian        ∇_μ log π = (a - μ)/σ²    ∇_log σ log π = (a - μ)²/σ² - 1    ∇_log σ H = 1
                    ∇_μ D = (μ - μ_old)/σ²    ∇_log σ D = 1 - (σ_old² + (μ - μ_old)²)/σ²
    categorical     ∇_y log π = 1[a] - p      ∇_y H = -p (log p + H)             ∇_y D = p - p_old
    Bernoulli       ∇_y log π = a - p         ∇_y H = -y p (1 - p)               ∇_y D = p - p_old

Each step agrees with autograd's up to the rounding of float32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sb3_trpo_ext.core.flat_optimizer import FlatDescent
from sb3_trpo_ext.core.reduction import ALONE, Reduction
from sb3_trpo_ext.policy.distributions import BernoulliFamily, CategoricalFamily, Family, GaussianFamily
from sb3_trpo_ext.policy.perceptron import Perceptron, Pieces
from sb3_trpo_ext.policy.plain_policy import PlainPolicy
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.rollout.forward import Array

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Head(ABC):
    """A distribution over actions at n states, from the outputs of a network, and its gradients.

    Args:
        log_std: log σ of a Gaussian, and where its gradient is to be written; not read by others.
        sizes: Options of each choice of a categorical distribution; not read by others.
    """

    def __init__(self, log_std: tuple[Array, Array] | None, sizes: tuple[int, ...]) -> None:
        self._log_std, self._sizes = log_std, sizes

    @abstractmethod
    def read(self, y: Array, actions: Array) -> tuple[Array, Any]:
        """Log π(a|s) and the entropies, ``(n,)`` each, for outputs ``(n, K)``; the entropy may be one number."""

    @abstractmethod
    def divergence(self, old_z: Array) -> Array:
        """D at each state that was read, ``(n,)``, for the coordinates of π_old; see `policy.distributions`."""

    @abstractmethod
    def pullback(self, c: Array, entropy_weight: float, kl_weight: float, old_z: Array | None, u: Array) -> None:
        """Write c ∇_y log π + (weight) ∇_y D - (weight) ∇_y H at what was read, ``(n, K)``; in log σ summed.

        Args:
            c: Weight of log π at each state, ``(n,)``.
            entropy_weight: Of the entropy at each state.
            kl_weight: Of the divergence at each state.
            old_z: The coordinates of π_old, if there is such a weight.
            u: Where to write.
        """


class GaussianHead(Head):
    """Independent Gaussians, y = μ."""

    def read(self, y: Array, actions: Array) -> tuple[Array, Any]:
        """See `Head.read`."""
        assert self._log_std is not None
        log_std = self._log_std[0]
        self._mean, self._scale = y, np.exp(log_std)
        if not ((self._scale > 0) & (self._scale < np.inf)).all():
            self._distance = np.full_like(y, np.nan)
            return np.full(len(y), np.nan, dtype=y.dtype), np.nan
        self._distance = (actions - y) / self._scale
        log_scale = float(log_std.sum())
        constant = log_scale + len(log_std) * HALF_LOG_2PI
        log_prob = np.einsum("na,na->n", self._distance, self._distance) * -0.5 - constant
        return log_prob, log_scale + len(log_std) * (0.5 + HALF_LOG_2PI)

    def _moved(self, old_z: Array) -> tuple[Array, Array]:
        """(μ - μ_old)/σ and log σ_old - log σ."""
        assert self._log_std is not None
        mean, log_std = np.split(old_z, 2, axis=1)
        return (self._mean - mean) / self._scale, log_std - self._log_std[0]

    def divergence(self, old_z: Array) -> Array:
        """See `Head.divergence`."""
        distance, x = self._moved(old_z)
        return 0.5 * (exp_remainder(2 * x) + distance**2).sum(axis=1)

    def pullback(self, c: Array, entropy_weight: float, kl_weight: float, old_z: Array | None, u: Array) -> None:
        """See `Head.pullback`."""
        assert self._log_std is not None
        gradient = self._log_std[1]
        np.multiply(c[:, None], self._distance, out=u)
        np.subtract(np.einsum("na,na->a", u, self._distance), c.sum() + entropy_weight * len(c), out=gradient)
        if old_z is not None:
            distance, x = self._moved(old_z)
            u += kl_weight * distance
            gradient += kl_weight * (1 - np.exp(2 * x) - distance**2).sum(axis=0)
        u /= self._scale


class CategoricalHead(Head):
    """Independent choices, y = logits; options are rows here, over which NumPy sums and maximises more quickly."""

    def read(self, y: Array, actions: Array) -> tuple[Array, Any]:
        """See `Head.read`."""
        logits = np.ascontiguousarray(y.T)
        self._log_p, self._p = np.empty_like(logits), np.empty_like(logits)
        self._entropies, self._taken, end = [], [], 0
        samples = np.arange(len(y))
        log_prob: Any = None
        for size, action in zip(self._sizes, actions.reshape(len(y), -1).T.astype(np.intp), strict=True):
            options = slice(end, end + size)
            p, log_p = self._p[options], self._log_p[options]
            np.subtract(logits[options], np.maximum.reduce(logits[options]), out=log_p)
            np.exp(log_p, out=p)
            total = np.add.reduce(p)
            p /= total
            log_p -= np.log(total)
            taken = action + end, samples
            log_prob = self._log_p[taken] if log_prob is None else log_prob + self._log_p[taken]
            self._entropies.append(-np.add.reduce(p * log_p))
            self._taken.append(taken)
            end += size
        return log_prob, sum(self._entropies[1:], self._entropies[0])

    def divergence(self, old_z: Array) -> Array:
        """See `Head.divergence`."""
        return mass_divergence(old_z, self._log_p.T)

    def pullback(self, c: Array, entropy_weight: float, kl_weight: float, old_z: Array | None, u: Array) -> None:
        """See `Head.pullback`."""
        gradient = self._p * -c
        for taken in self._taken:
            gradient[taken] += c
        if entropy_weight:
            spread = np.repeat(np.stack(self._entropies), self._sizes, axis=0)
            gradient += entropy_weight * self._p * (self._log_p + spread)
        if old_z is not None:
            gradient += kl_weight * (self._p - np.exp(old_z.T))
        u[...] = gradient.T


class BernoulliHead(Head):
    """Independent coins, y = logits."""

    def read(self, y: Array, actions: Array) -> tuple[Array, Any]:
        """See `Head.read`."""
        tail = np.log1p(np.exp(-np.abs(y)))
        self._log_heads, self._log_tails = np.minimum(y, 0) - tail, np.minimum(-y, 0) - tail
        self._y, self._p, self._actions = y, np.exp(self._log_heads), actions
        log_prob = (actions * self._log_heads + (1 - actions) * self._log_tails).sum(axis=1)
        return log_prob, -(self._p * self._log_heads + np.exp(self._log_tails) * self._log_tails).sum(axis=1)

    def divergence(self, old_z: Array) -> Array:
        """See `Head.divergence`."""
        tail = np.log1p(np.exp(-np.abs(old_z)))
        heads = mass_divergence(np.minimum(old_z, 0) - tail, self._log_heads)
        return heads + mass_divergence(np.minimum(-old_z, 0) - tail, self._log_tails)

    def pullback(self, c: Array, entropy_weight: float, kl_weight: float, old_z: Array | None, u: Array) -> None:
        """See `Head.pullback`."""
        np.multiply(c[:, None], self._actions - self._p, out=u)
        if entropy_weight:
            u += entropy_weight * self._y * self._p * np.exp(self._log_tails)
        if old_z is not None:
            u += kl_weight * (self._p - 1 / (1 + np.exp(-old_z)))


HEADS: dict[type[Family], type[Head]] = {
    GaussianFamily: GaussianHead,
    CategoricalFamily: CategoricalHead,
    BernoulliFamily: BernoulliHead,
}


def exp_remainder(y: Array) -> Array:
    """e^y - 1 - y >= 0 where y is small too, by way of float64."""
    wide = y.astype(np.float64)
    result: Array = (np.expm1(wide) - wide).astype(y.dtype)
    return result


def mass_divergence(log_old: Array, log_new: Array) -> Array:
    """Σ p' - p - p log(p'/p) >= 0, which is KL(p‖p') of masses that sum to one: ``(n, K)`` -> ``(n,)``."""
    p, d = np.exp(log_old), log_new - log_old
    return np.where(d > 1, np.exp(log_new) - p - p * d, p * exp_remainder(np.minimum(d, 1))).sum(axis=1)


PolicyLoss = Callable[[Array, Array], tuple[Array, Array, Array]]
"""r and Â -> what ℓ has of r and Â, its derivative c in log π, and what is logged of it, at each sample."""


def clipped(clip_range: float) -> PolicyLoss:
    """-min(r Â, clip(r, 1-ε, 1+ε) Â), and whether r is outside (Schulman et al. 2017, equation 7)."""

    def loss(ratio: Array, advantages: Array) -> tuple[Array, Array, Array]:
        downhill = -advantages
        plain = ratio * downhill
        bounded = np.minimum(np.maximum(ratio, 1 - clip_range), 1 + clip_range) * downhill
        outside = np.abs(ratio - 1) > clip_range
        return np.maximum(plain, bounded), np.where(outside & (plain < bounded), 0 * ratio, plain), outside

    return loss


def unclipped(ratio: Array, advantages: Array) -> tuple[Array, Array, Array]:
    """-r Â (Schulman et al. 2017, equation 8, without its penalty)."""
    plain = -ratio * advantages
    return plain, plain, np.zeros_like(plain)


@dataclass(frozen=True)
class Loss:
    """What a minibatch is to lower.

    Attributes:
        policy: The part of r and Â.
        kl_weight: β; None for no penalty, of which then nothing is logged either.
        entropy_weight: c_e.
        value_weight: c_v.
        value_bound: How far V' may be from V_old; None for V' = V.
    """

    policy: PolicyLoss
    kl_weight: float | None = None
    entropy_weight: float = 0.0
    value_weight: float = 0.5
    value_bound: float | None = None


class MinibatchSteps:
    """Steps of Adam along the gradients of a loss, minibatch by minibatch.

    Args:
        plain: The policy.
        descent: Of its parameters.
        loss: What to lower.
        reduction: Of whose samples the minibatches are.
    """

    def __init__(self, plain: PlainPolicy, descent: FlatDescent, loss: Loss, reduction: Reduction = ALONE) -> None:
        self._plain, self._descent, self._loss, self._reduction = plain, descent, loss, reduction
        self._networks: dict[int, _Networks] = {}

    def __enter__(self) -> MinibatchSteps:
        """Begin; see `FlatDescent`."""
        self._descent.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Bring parameters, gradients and the optimiser's state up to date."""
        self._descent.__exit__(*exception)

    def look_at(self, part: Minibatch) -> list[float]:
        """Run the policy on a minibatch.

        Returns:
            The means of (r - 1) - log r, of what is logged of the policy's loss, of that loss, of the values' loss, of
            minus the entropy, and the whole loss.
        """
        networks, loss = self._networks_for(len(part.advantages)), self._loss
        networks.x[...] = part.features
        networks.actor.forward()
        log_prob, entropy = networks.head.read(networks.y, part.actions)
        log_ratio = log_prob - part.old_log_prob
        ratio = np.exp(log_ratio)
        policy_loss, self._slope, logged = loss.policy(ratio, part.advantages)
        if loss.kl_weight is not None and part.old_z is not None:
            logged = loss.kl_weight * networks.head.divergence(part.old_z) if loss.kl_weight else np.zeros_like(ratio)
            policy_loss = policy_loss + logged
        networks.critic.forward()
        values = networks.values
        self._error = values - part.returns
        if loss.value_bound is not None:
            change = values - part.old_values
            bound = np.minimum(np.maximum(change, -loss.value_bound), loss.value_bound)
            self._error = part.old_values + bound - part.returns
            self._stays = np.abs(change) <= loss.value_bound
        self._part, self._current = part, networks
        rows = networks.rows
        np.subtract(ratio - 1, log_ratio, out=rows[0])
        rows[1], rows[2] = logged, policy_loss
        np.multiply(self._error, self._error, out=rows[3])
        np.negative(entropy, out=rows[4])
        sums = np.add.reduce(rows, axis=1)
        if self._reduction.workers > 1:
            self._pull_back()
            (self._gradient,), total_sums, _ = self._reduction.totals(
                [self._descent.gradient], torch.from_numpy(sums), torch.empty(0)
            )
            sums = total_sums.numpy()
        means: list[float] = (sums / self._reduction.count(len(ratio))).tolist()
        total = means[2] + loss.entropy_weight * means[4] if loss.entropy_weight else means[2]
        return [*means, total + loss.value_weight * means[3] if loss.value_weight else total]

    def descend(self, max_norm: float) -> bool:
        """Step along the gradient at the minibatch just looked at, scaled down to a norm.

        Returns:
            False, and nothing has moved, if the norm is not finite.
        """
        if self._reduction.workers == 1:
            self._pull_back()
            self._gradient = self._descent.gradient
        gradient = self._gradient
        norm = math.sqrt(gradient.dot(gradient))
        if not math.isfinite(norm):
            return False
        torch.mul(gradient, min(max_norm / (norm + 1e-6), 1.0), out=self._descent.gradient)
        self._descent.step()
        return True

    def _pull_back(self) -> None:
        """Write this worker's share of the gradient at the minibatch just looked at."""
        networks, loss, share = self._current, self._loss, 1.0 / self._reduction.count(len(self._slope))
        networks.head.pullback(
            self._slope * share,
            loss.entropy_weight * share,
            (loss.kl_weight or 0.0) * share,
            self._part.old_z if loss.kl_weight else None,
            networks.u,
        )
        networks.actor.pullback()
        if loss.value_weight:
            slope = (2 * loss.value_weight * share) * self._error
            networks.value_slopes[:] = slope * self._stays if loss.value_bound is not None else slope
            networks.critic.pullback()

    def _networks_for(self, rows: int) -> _Networks:
        if rows not in self._networks:
            descent = self._descent
            self._networks[rows] = _Networks(self._plain, rows, descent.parameters, descent.gradients)
        return self._networks[rows]


@dataclass(frozen=True)
class Minibatch:
    """Some samples of a rollout, as arrays.

    Attributes:
        features: What actor and critic see, ``(n, F)``.
        actions: Those taken, ``(n,)`` or ``(n, A)``.
        old_log_prob: log π_old(a|s), ``(n,)``.
        advantages: Â, ``(n,)``.
        returns: R, ``(n,)``.
        old_values: V_old, ``(n,)``.
        old_z: The coordinates of π_old, ``(n, K)``; or None.
    """

    features: Array
    actions: Array
    old_log_prob: Array
    advantages: Array
    returns: Array
    old_values: Array
    old_z: Array | None = None

    @classmethod
    def of_epoch(cls, batch: Batch, size: int, *, standardize: bool) -> list[Minibatch]:
        """The minibatches of an epoch, in order.

        Args:
            batch: The samples of the epoch with features for observations.
            size: Samples in each; the last may have fewer.
            standardize: Whether to standardise the advantages of each minibatch of more than one sample.
        """
        advantages = batch.advantages
        if standardize:
            whole = len(advantages) // size * size
            parts = [advantages[:whole].view(-1, size), advantages[None, whole:]]
            count = batch.reduction.count
            rows = [batch.reduction.standardized_rows(part) if count(part.shape[1]) > 1 else part for part in parts]
            advantages = torch.cat([part.flatten() for part in rows])
        assert isinstance(batch.observations, torch.Tensor)  # features
        columns = (batch.observations, batch.actions, batch.old_log_prob, advantages, batch.returns, batch.old_values)
        arrays: list[Any] = [column.numpy() for column in columns]
        if batch.old_z is not None:
            arrays.append(batch.old_z.numpy())
        slices = [slice(start, start + size) for start in range(0, len(batch), size)]
        return [cls(*[array[part] for array in arrays]) for part in slices]


class _Networks:
    """Actor, critic and distribution for minibatches of one size.

    Args:
        plain: The policy.
        rows: Samples in a minibatch.
        parameters: Where the parameters are.
        gradients: Where their gradients are to be written.
    """

    def __init__(self, plain: PlainPolicy, rows: int, parameters: Pieces, gradients: Pieces) -> None:
        x = torch.empty(rows, plain.n_features, dtype=torch.float32)
        self.x = x.numpy()
        self.actor = Perceptron(plain.actor_modules, x, parameters, gradients)
        self.critic = Perceptron(plain.critic_modules, x, parameters, gradients)
        self.y, self.u = self.actor.y.numpy(), self.actor.u.numpy()
        self.values, self.value_slopes = self.critic.y.numpy()[:, 0], self.critic.u.numpy()[:, 0]
        self.rows = np.empty((5, rows), dtype=self.x.dtype)
        family, log_std = plain.family, None
        if plain.log_std is not None:
            log_std = _log_std_and_slope(plain.log_std, parameters, gradients)
        sizes = family.sizes if isinstance(family, CategoricalFamily) else ()
        self.head = HEADS[type(family)](log_std, sizes)


def _log_std_and_slope(log_std: torch.nn.Parameter, parameters: Pieces, gradients: Pieces) -> tuple[Array, Array]:
    """What a Gaussian's head reads and writes; of a log σ that is held, the gradient is nobody's."""
    if log_std in parameters:
        return parameters[log_std].numpy(), gradients[log_std].numpy()
    held: Array = log_std.detach().numpy()
    return held, np.empty_like(held)
