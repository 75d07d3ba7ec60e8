"""What the first-order methods share: epochs of minibatch ascent on a surrogate, and the exact KL they reach."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule
from torch import Tensor

from sb3_trpo_ext.core.arguments import check_integer, check_number, check_schedule
from sb3_trpo_ext.core.flat_optimizer import FlatDescent, FlatOptimizer, can_descend, gradient_norm, take_over_steps
from sb3_trpo_ext.core.parameters import gradient, trainable
from sb3_trpo_ext.core.reduction import ALONE, Reduction, moments_here
from sb3_trpo_ext.policy.evaluation import consistent_evaluation
from sb3_trpo_ext.policy.memory_budget import GRAPHS, MEMORY_BUDGET, affordable_samples
from sb3_trpo_ext.policy.plain_policy import PlainPolicy
from sb3_trpo_ext.policy.problem import Comparison, PolicyEvaluation, PolicyOutput
from sb3_trpo_ext.policy.signal import NO_PARAMETER, NO_SIGNAL, has_signal, without_noise
from sb3_trpo_ext.rollout.action_values import has_action_values, of_taken
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.rollout.buffers import VIEWED_BUFFERS, minibatches, order_of_epoch, whole_rollout
from sb3_trpo_ext.rollout.forward import NotCoveredError
from sb3_trpo_ext.rollout.joint_rollout import INDEX_BYTES, JointRollout
from sb3_trpo_ext.rollout.sequences import SequenceBatch
from sb3_trpo_ext.training.action_values import ROUNDING, advantages_of_all
from sb3_trpo_ext.training.arguments import check_minibatches, check_rollout_size
from sb3_trpo_ext.training.base import Outcome, TrustRegionAlgorithm, UpdateRejectedError, plain, timed
from sb3_trpo_ext.training.minibatch_kernel import Loss, Minibatch, MinibatchSteps
from sb3_trpo_ext.training.transaction import PolicyCheckpoint, Restorable

KL_CHUNK_SIZE = 2048
"""Most samples in one forward pass when the exact KL is evaluated."""

KL_CHUNK_BYTES = 3 * 2**19
"""Bytes that autograd would save of such a pass, if there are more samples in it than in a minibatch."""

OLD_Z_BYTES = 8 * 2**20
"""Bytes of the coordinates of π_old up to which they are kept where only the exact KL needs them."""

BY_HAND = (
    "_policy_loss",
    "_losses",
    "_clipped_values",
    "loss_on",
    "_minibatches",
    "_steps",
    "_exceeds_target",
    "entropy_weight",
)
"""Methods whose overriding could change an epoch, or look at it, in a way that updates by hand do not know."""

LARGEST_BY_HAND = 2**21
"""Numbers in the parameters, of which there are several copies, up to which minibatches go by hand; and in the features
of a rollout, where there are more than twice as many as in its observations."""

FLOP_OF_A_MESSAGE = 3e7
"""What can be computed by hand while a message travels, beside what is to be computed in any case.

1 ms at 30 GFLOP/s: between processes of a machine a message takes 0.3 to 1 ms, and longer with the gradient of large
networks in it, of which minibatches are also computed faster. Nothing is timed, so that a run can be repeated.
"""

JOINT_BYTES = 64 * 2**20
"""Bytes of all workers' samples up to which each of them may have them whole."""

NOT_A_DISTRIBUTION = "the policy's distribution is not finite"

Statistics = dict[str, list[float]]


class PolicyDivergedError(UpdateRejectedError):
    """The update must be undone because of what the policy has become; the critic, if at all, has no part in it."""


class RecomputedComparison:
    """What `Comparison.evaluate` tells, without the coordinates of π_old: the parameters at θ_old are kept instead.

    With thousands of actions the coordinates of a rollout are by far the largest of all that an update holds.

    Args:
        policy: The policy at θ_old.
        batch: The samples.
        chunk_size: Most samples in one forward pass.
    """

    def __init__(self, policy: ActorCriticPolicy, batch: Batch, chunk_size: int) -> None:
        self._policy = policy
        self._reduction = batch.reduction
        self._chunks = batch.split(chunk_size)
        self._old = PolicyCheckpoint(policy)

    def evaluate(self) -> PolicyEvaluation:
        """Evaluate the policy with the parameters it has now, chunk by chunk beside those at θ_old."""
        now, shares = PolicyCheckpoint(self._policy), []
        for chunk in self._chunks:  # of which another worker may have more
            self._old.restore()
            comparison = Comparison(self._policy, replace(chunk, reduction=ALONE))
            now.restore()
            shares.append(comparison.evaluate())
        if self._reduction.workers == 1:
            return PolicyEvaluation(
                objective=sum(share.objective for share in shares),
                divergence=sum(share.divergence for share in shares),
                kl_max=float(np.max([share.kl_max for share in shares])),
                entropy=sum(share.entropy for share in shares),
            )
        columns = torch.tensor([[share.objective, share.divergence, share.entropy, share.kl_max] for share in shares])
        largest = self._reduction.largest_share(columns[:, 3])[None]
        _, sums, largest = self._reduction.totals([], columns[:, :3].sum(dim=0), largest)
        objective, divergence, entropy = sums.tolist()
        return PolicyEvaluation(objective, divergence, float(largest), entropy)


class AutogradSteps:
    """Steps along the gradients of a model's losses, minibatch by minibatch, by autograd; see `MinibatchSteps`.

    Args:
        model: The model.
    """

    def __init__(self, model: FirstOrderAlgorithm) -> None:
        self._model = model
        self._optimizer = FlatOptimizer(model.policy.optimizer, model.policy, lowest=model._lowest())
        self._before = self._told = torch.empty(0)

    def __enter__(self) -> AutogradSteps:
        """Begin."""
        self._optimizer.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Bring the optimiser's state up to date."""
        self._optimizer.__exit__(*exception)

    def look_at(self, part: Batch) -> list[float]:
        """Run the policy on a minibatch; what is logged of it."""
        if self._model.reduction.workers > 1:
            return self._look_together(part)
        actor_loss, critic_loss, record = self._model.loss_on(part)
        self._loss = actor_loss + critic_loss
        means: list[float] = torch.stack(list(record.values())).tolist()
        return means

    def ahead(self, parts: Iterable[tuple[Batch, Any]]) -> Iterator[tuple[Batch, Callable[[], Batch]]]:
        """Minibatches of several workers, with the advantages that the loss is to see.

        What workers have to tell each other of a minibatch before any of them can look at it goes in the message that
        they have anyway about the one before.
        """
        rest = (part for part, _ in parts)
        part: Batch | None = next(rest)
        assert part is not None  # there is one at least
        told = self._model.reduction.gather(self._to_tell(part))
        while part is not None:
            following = next(rest, None)
            self._before = torch.zeros_like(told[:4]) if following is None else self._to_tell(following)
            part = self._standardized(part, told)
            yield part, partial(replace, part)
            part, told = following, self._told

    @staticmethod
    def _to_tell(part: Batch) -> Tensor:
        """What is to be known of a minibatch's advantages."""
        return moments_here(part.advantages)

    def _standardized(self, part: Batch, told: Tensor) -> Batch:
        if not (self._model.normalize_advantage and part.reduction.count(len(part)) > 1):
            return part
        moments = told.view(part.reduction.workers, -1)
        return replace(part, advantages=part.reduction.standardized(part.advantages, moments))

    def _look_together(self, part: Batch) -> list[float]:
        """The same, of workers' shares; where the policy of one of them has diverged, all of them say so.

        One message: the gradient goes along, which nobody may need.
        """
        reduction, shares, diverged = self._model.reduction, torch.zeros(6), 0.0
        gradients = None
        try:
            actor_loss, critic_loss, record = self._model.loss_on(part)
            shares = torch.stack(list(record.values()))
            gradients = self._optimizer.gradients(actor_loss + critic_loss)
        except PolicyDivergedError:
            diverged = 1.0
        gradients = self._optimizer.no_gradients() if gradients is None else gradients
        numbers = shares.new_tensor([diverged])
        self._gradients, means, diverged_somewhere, self._told = reduction.totals_and_parts(
            gradients, shares, numbers, self._before
        )
        if bool(diverged_somewhere):
            raise PolicyDivergedError(NOT_A_DISTRIBUTION)
        found: list[float] = means.tolist()
        return found

    def descend(self, max_norm: float) -> bool:
        """Step along the gradient at the minibatch just looked at; False, and nothing has moved, if not finite."""
        if self._model.reduction.workers > 1:
            return self._optimizer.descend_along(self._gradients, max_norm)
        loss, self._loss = self._loss, torch.empty(0)
        return self._optimizer.descend(loss, max_norm)


@dataclass(frozen=True)
class Ascent:
    """What the epochs of an update did.

    Attributes:
        record: What to log of the minibatches: means over them, and the loss of the last one.
        evaluation: The policy that they leave, on the whole rollout.
        reached: The mean KL divergence that they reached, in an epoch that was rolled back too.
        epochs: How many were kept.
        reason: Why nothing of them was kept; empty if something was.
    """

    record: dict[str, float]
    evaluation: PolicyEvaluation
    reached: float
    epochs: int
    reason: str = ""


class FirstOrderAlgorithm(TrustRegionAlgorithm):
    """Template: epochs of minibatch steps on a policy loss, plus ``vf_coef`` value losses, less the entropy bonus.

    A subclass implements `_policy_loss`. Its constructor ends with ``_setup_model``. The exact joint KL divergence of
    the whole rollout is known before the first epoch and after the last, and after each where ``max_kl`` bounds it.

    Of several workers each computes its share of a minibatch and tells the others, in one message; or, where that takes
    longer than a whole minibatch, all have the rollout whole, and each takes all steps (see `_joined`).

    Args:
        policy: As in SB3.
        env: As in SB3.
        batch_size: Those arguments that follow are documented where the user meets them, in `PPOClip`.
    """

    refused_arguments: ClassVar[Mapping[str, str]] = {
        "target_kl_std": "its minibatch steps have no radius for σ to have one beside: use `log_std_min`, or the class "
        "TRPO",
    }

    loss_statistic: ClassVar[str]
    """The name under which what `_policy_loss` returns beside the loss is logged."""

    loss_needs_old_z: ClassVar[bool] = False
    """Whether `_policy_loss` needs the coordinates of π_old."""

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        *,
        batch_size: int,
        n_epochs: int,
        clip_range_vf: float | Schedule | None,
        normalize_advantage: bool,
        max_kl: float | None = None,
        critic: Literal["value", "action_value"] = "value",
        **kwargs: Any,
    ) -> None:
        self._refuse(kwargs)
        super().__init__(policy, env, **kwargs)
        self.critic = critic
        self._advantage_scale = 1.0
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.max_kl = max_kl

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(plain(self.clip_range_vf))

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if self.critic not in ("value", "action_value"):
            raise ValueError(f"`critic` must be 'value' or 'action_value', got {self.critic!r}.")
        if self.normalize_advantage and self.batch_size <= 1:
            raise AssertionError(
                f"`batch_size` must be greater than 1 to normalise advantages, got {self.batch_size}. Raise it or pass "
                "normalize_advantage=False."
            )
        for name in ("batch_size", "n_epochs"):
            check_integer(name, getattr(self, name))
        if isinstance(self.clip_range_vf, (int, float)):
            if not self.clip_range_vf > 0:
                raise AssertionError(
                    f"`clip_range_vf` must be positive, got {self.clip_range_vf}; pass `None` to deactivate value "
                    "clipping."
                )
        elif self.clip_range_vf is not None:
            check_schedule("clip_range_vf", self.clip_range_vf, hint="Pass None to switch value clipping off.")
        self._check_minibatch_share()
        if self.max_kl is not None:
            check_number("max_kl", self.max_kl, positive=True, hint="Pass None for no bound.")
        if self.env is not None:
            check_rollout_size(self.n_steps, self.n_envs, normalize_advantage=self.normalize_advantage)
            check_minibatches(self.n_steps, self.n_envs, self._minibatch_share())

    @abstractmethod
    def _policy_loss(self, part: Batch, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the objective on a minibatch that the policy was just run on, and the `loss_statistic`.

        Args:
            part: The minibatch.
            ratio: r = π_θ(a|s)/π_old(a|s), with its graph.
            advantages: Â, standardised if asked for.
        """

    def _loss_by_hand(self) -> Loss:
        """The same as `_policy_loss` for policies of plain layers, if the class has it.

        A class that overrides one of the two overrides both, or its updates go by autograd.
        """
        raise NotCoveredError("a policy loss without a gradient by hand")

    def _require_fast_updates(self) -> PlainPolicy:
        plain = super()._require_fast_updates()
        if plain.has_action_values:
            raise NotCoveredError("a value for each action")
        known = next(kind for kind in type(self).__mro__ if "_loss_by_hand" in vars(kind))
        for name in BY_HAND:
            if getattr(getattr(self, name), "__func__", None) is not getattr(known, name):
                raise NotCoveredError(f"{type(self).__name__} has its own {name}")
        self._loss_by_hand()
        if type(self.rollout_buffer) not in (RolloutBuffer, DictRolloutBuffer):
            raise NotCoveredError(f"rollout buffer {type(self.rollout_buffer).__name__}")
        optimizer, params = self.policy.optimizer, plain.trained_parameters()
        if not can_descend(optimizer, self.policy, params):
            raise NotCoveredError(f"optimizer {type(optimizer).__name__} with settings, hooks or parameters of its own")
        if sum(param.numel() for param in params) > LARGEST_BY_HAND:
            raise NotCoveredError("parameters that take too much memory")
        batch = whole_rollout(self.rollout_buffer, self.action_space)
        numbers = len(batch) * plain.n_features
        if numbers > LARGEST_BY_HAND and numbers * torch.finfo(torch.float32).bits // 8 > 2 * batch.nbytes:
            raise NotCoveredError("features that take too much memory")
        return plain

    def _features(self, batch: Batch) -> Tensor:
        """What the actor sees of a batch, ``(N, F)``."""
        assert self._plain_policy is not None  # asked where there is one
        return self._plain_policy.features(batch.inputs)

    def _exceeds_target(self, approx_kl: float, epoch: int) -> bool:
        """Whether the sampled KL estimate of a minibatch ends the update before its step."""
        return False

    def _cures(self) -> str:
        bound = "" if self.max_kl is None else "a larger `max_kl`, "
        return f"{bound}a smaller `learning_rate`, a smaller `max_grad_norm`, {super()._cures()}"

    def _update(self) -> Outcome:
        record: dict[str, float] = {}
        with timed(record, "time/policy_s"):
            rollout = whole_rollout(self.rollout_buffer, self.action_space, self.reduction)
            batch = self._joined(without_noise(rollout, self.rollout_buffer))
            if self.surrogate == "sampled" and not has_signal(batch):
                self._tell_once("the policy loss of this rollout is left out", NO_SIGNAL)
            comparison = self._comparison(batch)
            ascent = self._ascent(comparison, self._prepared(batch, comparison))
        reason = ascent.reason if trainable(self.policy) else NO_PARAMETER
        record |= ascent.record
        if self.clip_range_vf is not None:
            record["train/clip_range_vf"] = self._current_value(self.clip_range_vf)
        record |= self._log_entries(ascent.evaluation)
        self._adapt(ascent)
        return Outcome(record, reason)

    def _joined(self, batch: Batch) -> Batch:
        """The samples of all workers, where it is cheaper for each to take all steps than to wait in each for others.

        A minibatch of n samples and P parameters is 6 n P operations by hand, of which W workers that share it would
        spare each other 1 - 1/W, for a message.
        """
        plain, workers = self._plain_policy, batch.reduction.workers
        if plain is None or workers == 1:
            return batch
        share = min(self._minibatch_share(), len(batch))
        flop = 6 * share * (workers - 1) * sum(param.numel() for param in plain.trained_parameters())
        row = batch.row_bytes + plain.n_features * torch.float32.itemsize + self.n_epochs * INDEX_BYTES
        if flop > FLOP_OF_A_MESSAGE or workers * len(batch) * row > JOINT_BYTES:
            return batch
        return JointRollout.of(batch, self.rollout_buffer, epochs=self.n_epochs, share=share)

    def _ascent(self, comparison: Comparison | RecomputedComparison, batch: Batch) -> Ascent:
        """The epochs; where every worker took all of their steps, what came of them is what came of the first one's.

        Those of others differ from it at most where their processors round otherwise. Nobody goes on before all are
        done, so that what ends one of them ends the update of all.
        """
        if not isinstance(batch, JointRollout):
            return self._epochs(comparison, batch)
        before, updates = self._checkpoints(), self._n_updates
        mine: Ascent | UpdateRejectedError
        try:
            mine = self._epochs(comparison, batch)
        except UpdateRejectedError as rejection:
            mine = rejection
        found = self._of_first_when_all_are_done(mine)
        if isinstance(found, UpdateRejectedError):
            raise found
        self._n_updates = updates + found.epochs
        if not found.epochs:
            for state in before:
                state.restore()
        elif self._plain_policy is not None:  # as it is where there is a joint rollout
            take_over_steps(self.policy.optimizer, self._plain_policy.trained_parameters(), self.reduction)
        return found

    @torch.no_grad()
    def _comparison(self, batch: Batch) -> Comparison | RecomputedComparison:
        """The policy as it is now, to be compared with what the epochs make of it.

        A forward pass without a graph takes less memory than a minibatch of as many samples.
        """

        def coordinates(part: Batch) -> Tensor:
            return PolicyOutput.of(self.policy, part).z

        with consistent_evaluation(self.policy):
            affordable = affordable_samples(self.policy, coordinates, batch)
            old_z_bytes = len(batch) * coordinates(batch[:1]).nbytes
        chunk_size = max(self.batch_size, min(KL_CHUNK_SIZE, affordable * KL_CHUNK_BYTES * GRAPHS // MEMORY_BUDGET))
        if old_z_bytes > OLD_Z_BYTES and not self._needs_old_z():
            return RecomputedComparison(self.policy, batch, chunk_size)
        with consistent_evaluation(self.policy):
            return Comparison(self._plain_policy or self.policy, batch, chunk_size=chunk_size)

    def _prepared(self, batch: Batch, comparison: Comparison | RecomputedComparison) -> Batch:
        """The batch with what the losses need to know of π_old and its critic."""
        if self._needs_old_z():
            assert isinstance(comparison, Comparison)
            batch = replace(batch, old_z=comparison.old_z)
        if self.has_action_values and self.clip_range_vf is not None:  # what is clipped is Q(s,a)
            with torch.no_grad(), consistent_evaluation(self.policy):
                old = [part.values(self.policy) for part in batch.split(self.batch_size)]
            batch = replace(batch, old_values=torch.cat(old))
        return batch

    def _needs_old_z(self) -> bool:
        """Whether the policy loss needs the coordinates of π_old."""
        return self.loss_needs_old_z or self.surrogate == "expected"

    def _log_entries(self, evaluation: PolicyEvaluation) -> dict[str, float]:
        """What to log of the policy that an update leaves."""
        return {
            "train/kl_divergence_loss": evaluation.divergence,
            "train/kl_max": evaluation.kl_max,
            "train/entropy": evaluation.entropy,
            **evaluation.remarks,
        }

    def _adapt(self, ascent: Ascent) -> None:
        """Prepare the next update, knowing what this one did."""

    def _epochs(self, comparison: Comparison | RecomputedComparison, batch: Batch) -> Ascent:
        """Run the epochs."""
        statistics: Statistics = defaultdict(list)
        evaluation: PolicyEvaluation | None = None
        for epoch in range(self.n_epochs):
            before = self._checkpoints() if self.max_kl is not None else ()
            within_target = self._epoch(epoch, batch, statistics)
            if self.max_kl is not None:
                trial = self._evaluated(comparison)
                if not trial.divergence <= self.max_kl:
                    for state in before:
                        state.restore()
                    reason = "" if epoch else "the first epoch left the ball of radius `max_kl`"
                    left = evaluation or self._evaluated(comparison)
                    return Ascent(_record_of(statistics), left, trial.divergence, epoch, reason)
                evaluation = trial
            self._n_updates += 1
            if not within_target:
                break
        if evaluation is None:
            evaluation = self._evaluated(comparison)
        return Ascent(_record_of(statistics), evaluation, evaluation.divergence, epoch + 1)

    def _evaluated(self, comparison: Comparison | RecomputedComparison) -> PolicyEvaluation:
        with consistent_evaluation(self.policy):
            return comparison.evaluate()

    def _epoch(self, epoch: int, batch: Batch, statistics: Statistics) -> bool:
        """One pass over the rollout; False if the sampled KL estimate exceeded its target."""
        self.policy.set_training_mode(True)
        statistics["approx_kl"] = []  # SB3 logs the mean over the last epoch alone
        records: list[list[float]] = []
        if self.surrogate == "expected" and self.normalize_advantage:
            self._advantage_scale = self._deviation_over_actions(batch)
        within_target, unusable = True, None
        with self._steps(batch.reduction) as steps:
            parts = self._minibatches(batch, epoch)
            if isinstance(steps, AutogradSteps) and self.reduction.workers > 1:
                parts = steps.ahead(parts)
            for part, samples in parts:
                records.append(steps.look_at(part))
                if self._exceeds_target(records[-1][0], epoch):
                    within_target = False
                    break
                if not steps.descend(self.max_grad_norm):
                    unusable = samples()
                    break
        if unusable is not None:
            raise self._rejection(unusable)
        names = ("approx_kl", self.loss_statistic, "policy_gradient_loss", "value_loss", "entropy_loss", "loss")
        for key, column in zip(names, zip(*records, strict=True), strict=True):
            statistics[key].extend(column)
        return within_target

    def _minibatches(self, batch: Batch, epoch: int) -> Iterator[tuple[Any, Callable[[], Batch]]]:
        """What `_steps` look at, and the samples that those are."""
        if self._plain_policy is not None:
            order = order_of_epoch(self.rollout_buffer)
            if isinstance(batch, JointRollout):
                order = batch.orders[:, epoch]
            seen = replace(batch, observations=self._features(batch))[order]
            size = self.batch_size // batch.reduction.workers
            parts = Minibatch.of_epoch(seen, size, standardize=self.normalize_advantage)
            for minibatch, rows in zip(parts, order.split(size), strict=True):
                yield minibatch, partial(self._samples, batch, rows, minibatch)
            return
        own = type(self.rollout_buffer) not in VIEWED_BUFFERS and not isinstance(batch, SequenceBatch)
        silent = own and not has_signal(batch)
        for part in minibatches(self.rollout_buffer, batch, self._minibatch_share(), self.action_space):
            if silent:  # a buffer of another kind deals out its own advantages
                part = replace(part, advantages=torch.zeros_like(part.advantages))
            yield part, partial(replace, part)

    def _samples(self, batch: Batch, rows: Tensor, minibatch: Minibatch) -> Batch:
        """The samples of a minibatch, as `_losses` is to see them."""
        part = batch[rows]
        return part if batch.reduction.workers == 1 else replace(part, advantages=torch.tensor(minibatch.advantages))

    def _steps(self, reduction: Reduction) -> MinibatchSteps | AutogradSteps:
        """How an epoch's steps are taken, of whose samples a reduction is."""
        if self._plain_policy is None:
            return AutogradSteps(self)
        bound = None if self.clip_range_vf is None else self._current_value(self.clip_range_vf)
        loss = replace(
            self._loss_by_hand(), entropy_weight=self.entropy_weight(), value_weight=self.vf_coef, value_bound=bound
        )
        params = self._plain_policy.trained_parameters()
        others = {*self.policy.parameters()} - {*params}
        descent = FlatDescent(self.policy.optimizer, params, others, self._lowest())
        return MinibatchSteps(self._plain_policy, descent, loss, reduction)

    def loss_on(self, part: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """`_losses`, of a policy whose distribution may be beyond what torch takes for one."""
        try:
            return self._losses(part)
        except ValueError as error:
            if "to satisfy the constraint" not in str(error):
                raise
            raise PolicyDivergedError(NOT_A_DISTRIBUTION) from error

    def _rejection(self, part: Batch) -> UpdateRejectedError:
        """Why a minibatch's gradient is not finite, the same for all workers."""
        reason = "the gradient of the loss is not finite"
        diverged, infinite = part.reduction.largest_of(torch.tensor(self._blame(part))).tolist()
        if diverged:
            return PolicyDivergedError(NOT_A_DISTRIBUTION)
        return PolicyDivergedError(reason) if infinite else UpdateRejectedError(reason)

    def _blame(self, part: Batch) -> tuple[float, float]:
        """Whether on this worker's samples the distribution, and the actor's part of the gradient, is not finite."""
        try:
            actor_loss, _, _ = self.loss_on(part)
        except PolicyDivergedError:
            return 1.0, 1.0
        if not bool(PolicyOutput.after_evaluation(self.policy, part).z.isfinite().all()):
            return 1.0, 1.0
        found = gradient([actor_loss], trainable(self.policy))
        return 0.0, float(bool(found) and not math.isfinite(gradient_norm(list(found.values()))))

    def _check_outcome(self, record: dict[str, float], before: Sequence[Restorable]) -> None:
        try:
            super()._check_outcome(record if self.vf_coef else {**record, "train/value_loss": 0.0}, before)
        except UpdateRejectedError as rejection:
            if math.isfinite(record["train/value_loss"]):
                raise PolicyDivergedError(str(rejection)) from rejection
            raise

    def _losses(self, part: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The actor's and the critic's part of the loss on a minibatch, with their graphs, and what is logged.

        ``approx_kl`` is the sampled KL estimate, the mean of (r - 1) - log r.
        """
        mean = part.reduction.mean
        action_values = None
        if has_action_values(self.policy):
            action_values, log_prob, entropy = part.evaluate_action_values(self.policy)
            values = of_taken(action_values, part.actions)
        else:
            values, log_prob, entropy = part.evaluate_actions(self.policy)

        log_ratio = log_prob - part.old_log_prob
        ratio = torch.exp(log_ratio)
        if self.surrogate == "expected" and action_values is not None:
            policy_loss, statistic = self._policy_loss(part, *self._of_all_actions(part, action_values.detach()))
        else:
            advantages = part.advantages
            if self.normalize_advantage and part.reduction.count(len(advantages)) > 1 and part.reduction.workers == 1:
                advantages = part.reduction.standardized(advantages)  # those of several workers have been by `ahead`
            policy_loss, statistic = self._policy_loss(part, ratio, advantages)
        value_loss = mean((part.returns - self._clipped_values(values, part.old_values)).square())
        entropy_loss = -mean(-log_prob if entropy is None else entropy)
        # A bonus of weight zero changes no bit of the loss and its gradient, but costs a backward pass.
        weight = self.entropy_weight()
        actor_loss = policy_loss + weight * entropy_loss if weight else policy_loss
        # With weight zero the critic has gradients of zero, as in SB3, even where its loss is not finite.
        critic_loss = self.vf_coef * value_loss if self.vf_coef else (0 * values).nan_to_num().sum()

        record = {
            "approx_kl": mean(ratio.detach() - 1 - log_ratio.detach()),
            self.loss_statistic: statistic,
            "policy_gradient_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "entropy_loss": entropy_loss.detach(),
            "loss": (actor_loss + critic_loss).detach(),
        }
        return actor_loss, critic_loss, record

    def _of_all_actions(self, part: Batch, action_values: Tensor) -> tuple[Tensor, Tensor]:
        """Ratios and advantages of all actions, ``(N, K)`` each, on a minibatch that the policy was just run on.

        A(s,·) = Q(s,·) - Σ_a π_old(a|s) Q(s,a) is that of the critic as the steps have left it.
        """
        assert part.old_z is not None  # see _prepared: log π_old
        advantages = _without_rounding(action_values, part.old_z) / self._advantage_scale
        log_prob = PolicyOutput.after_evaluation(self.policy, part).z
        return torch.exp(log_prob - part.old_z), advantages

    @torch.no_grad()
    def _deviation_over_actions(self, batch: Batch) -> float:
        """The standard deviation of A over states and π_old, whose mean is zero: √E[Σ_a π_old A²]."""
        policy: Any = self.policy
        shares = []
        for part in batch.split(self.batch_size):
            assert part.old_z is not None  # see _prepared: log π_old
            advantages = _without_rounding(policy.action_values(part.inputs), part.old_z)
            shares.append(part.mean(part.over_actions(advantages.square())))
        return math.sqrt(batch.reduction.number(torch.stack(shares).sum())) + 1e-8

    def _clipped_values(self, values: Tensor, old_values: Tensor) -> Tensor:
        if self.clip_range_vf is None:
            return values
        bound = self._current_value(self.clip_range_vf)
        return old_values + torch.clamp(values - old_values, -bound, bound)


def _without_rounding(action_values: Tensor, log_old: Tensor) -> Tensor:
    """A(s,·) from Q(s,·) and log π_old(·|s), ``(N, K)`` each, zero where Q is alike but for its rounding."""
    advantages = advantages_of_all(action_values, log_old.exp())
    least = ROUNDING * action_values.abs().amax(dim=1, keepdim=True)
    return torch.where(advantages.abs() <= least, 0.0, advantages)


def _record_of(statistics: Statistics) -> dict[str, float]:
    """What to log of minibatches."""
    record = {f"train/{key}": float(np.mean(values)) for key, values in statistics.items()}
    return record | {"train/loss": statistics["loss"][-1]}
