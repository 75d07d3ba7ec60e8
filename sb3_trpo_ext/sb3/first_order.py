"""What the first-order methods share: epochs of minibatch ascent on a surrogate, and the exact KL they reach."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule
from torch import Tensor
from torch.nn import functional as F

from sb3_trpo_ext.sb3.algorithm import TrustRegionAlgorithm, UpdateRejectedError, timed
from sb3_trpo_ext.sb3.batch import Batch, consistent_evaluation
from sb3_trpo_ext.sb3.buffers import minibatches, whole_rollout
from sb3_trpo_ext.sb3.checks import (
    check_integer,
    check_minibatches,
    check_number,
    check_rollout_size,
    check_schedule,
)
from sb3_trpo_ext.sb3.optimizer import FlatOptimizer
from sb3_trpo_ext.sb3.parameters import gradient, trainable
from sb3_trpo_ext.sb3.policy_problem import PolicyEvaluation, PolicyProblem
from sb3_trpo_ext.sb3.signal import NO_SIGNAL, has_signal, without_noise

KL_CHUNK_SIZE = 2048
"""Most samples in one forward pass when the exact KL is evaluated."""

Statistics = dict[str, list[float]]


@dataclass(frozen=True)
class Ascent:
    """What the epochs of an update did.

    Attributes:
        statistics: By name, of each minibatch.
        evaluation: The policy that they leave, on the whole rollout.
        reached: The mean KL divergence that they reached, in an epoch that was rolled back too.
        reason: Why nothing of them was kept; empty if something was.
    """

    statistics: Statistics
    evaluation: PolicyEvaluation
    reached: float
    reason: str = ""


class FirstOrderAlgorithm(TrustRegionAlgorithm):
    """Template: epochs of minibatch steps on a policy loss, plus ``vf_coef`` value losses, less the entropy bonus.

    A subclass implements `_policy_loss`. Its constructor ends with ``_setup_model``. The exact joint KL divergence of
    the whole rollout is known before the first epoch and after the last, and after each where ``max_kl`` bounds it.

    Args:
        policy: As in SB3.
        env: As in SB3.
        batch_size: Those arguments that follow are documented where the user meets them, in `PPOClip`.
    """

    loss_statistic: ClassVar[str]
    """The name under which what `_policy_loss` returns beside the loss is logged."""

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        *,
        batch_size: int,
        n_epochs: int,
        clip_range_vf: float | Schedule | None,
        normalize_advantage: bool,
        max_kl: float | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, env, **kwargs)
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.max_kl = max_kl

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)

    def _check_arguments(self) -> None:
        super()._check_arguments()
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
                    f"`clip_range_vf` must be positive, got {self.clip_range_vf}. Pass None to switch value clipping "
                    "off."
                )
        elif self.clip_range_vf is not None:
            check_schedule("clip_range_vf", self.clip_range_vf, hint="Pass None to switch value clipping off.")
        if self.max_kl is not None:
            check_number("max_kl", self.max_kl, positive=True, hint="Pass None for no bound.")
        if self.env is not None:
            check_rollout_size(self.n_steps, self.n_envs, normalize_advantage=self.normalize_advantage)
            check_minibatches(self.n_steps, self.n_envs, self.batch_size)

    @abstractmethod
    def _policy_loss(self, part: Batch, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the objective on a minibatch that the policy was just run on, and the `loss_statistic`.

        Args:
            part: The minibatch.
            ratio: r = π_θ(a|s)/π_old(a|s), with its graph.
            advantages: Â, standardised if asked for.
        """

    def _exceeds_target(self, approx_kl: Tensor, epoch: int) -> bool:
        """Whether the sampled KL estimate of a minibatch ends the update before its step."""
        return False

    def _cures(self) -> str:
        bound = "" if self.max_kl is None else "a larger `max_kl`, "
        return f"{bound}a smaller `learning_rate`, a smaller `max_grad_norm`, {super()._cures()}"

    def _update(self) -> dict[str, float]:
        record: dict[str, float] = {}
        with timed(record, "time/policy_s"):
            batch = without_noise(whole_rollout(self.rollout_buffer, self.action_space), self.rollout_buffer)
            if not has_signal(batch):
                self._tell_once("the policy loss of this rollout is left out", NO_SIGNAL)
            problem = PolicyProblem(self.policy, batch, chunk_size=KL_CHUNK_SIZE)
            self._exact(problem)
            ascent = self._epochs(problem, self._prepared(batch, problem))
        self._report_rejection(ascent.reason) if ascent.reason else self._report_success()

        means = {key: float(np.mean(values)) for key, values in ascent.statistics.items()}
        record |= {f"train/{key}": value for key, value in means.items() if key != "loss"}
        record["train/loss"] = ascent.statistics["loss"][-1]
        if self.clip_range_vf is not None:
            record["train/clip_range_vf"] = self._in_force(self.clip_range_vf)
        record |= self._described(ascent.evaluation)
        self._adapt(ascent.reached)
        return record

    def _prepared(self, batch: Batch, problem: PolicyProblem) -> Batch:
        """The batch with what the policy loss needs to know of π_old."""
        return batch

    def _described(self, evaluation: PolicyEvaluation) -> dict[str, float]:
        """What to log of the policy that an update leaves."""
        return {
            "train/kl_divergence_loss": evaluation.divergence,
            "train/kl_max": evaluation.kl_max,
            "train/entropy": evaluation.entropy,
        }

    def _adapt(self, divergence: float) -> None:
        """Prepare the next update, knowing the mean KL divergence that this one reached."""

    def _epochs(self, problem: PolicyProblem, batch: Batch) -> Ascent:
        """Run the epochs."""
        statistics: Statistics = defaultdict(list)
        evaluation = problem.start
        for epoch in range(self.n_epochs):
            before = self._checkpoints() if self.max_kl is not None else ()
            within_target = self._epoch(epoch, batch, statistics)
            if self.max_kl is not None:
                trial = self._exact(problem)
                if not trial.divergence <= self.max_kl:
                    for state in before:
                        state.restore()
                    reason = "" if epoch else "the first epoch left the ball of radius `max_kl`"
                    return Ascent(statistics, evaluation, trial.divergence, reason)
                evaluation = trial
            self._n_updates += 1
            if not within_target:
                break
        if self.max_kl is None:
            evaluation = self._exact(problem)
        return Ascent(statistics, evaluation, evaluation.divergence)

    def _exact(self, problem: PolicyProblem) -> PolicyEvaluation:
        with consistent_evaluation(self.policy):
            return problem.evaluate()

    def _epoch(self, epoch: int, batch: Batch, statistics: Statistics) -> bool:
        """One pass over the rollout; False if the sampled KL estimate exceeded its target."""
        self.policy.set_training_mode(True)
        statistics["approx_kl"] = []  # SB3 logs the mean over the last epoch alone
        params = trainable(self.policy)
        records: list[Tensor] = []
        within_target, silent = True, not has_signal(batch)
        with FlatOptimizer(self.policy.optimizer) as optimizer:
            for part in minibatches(self.rollout_buffer, batch, self.batch_size, self.action_space):
                if silent:  # a buffer of another kind deals out its own advantages
                    part = replace(part, advantages=torch.zeros_like(part.advantages))
                loss, record = self._loss(part)
                records.append(record)
                if self._exceeds_target(record[0], epoch):
                    within_target = False
                    break
                if not optimizer.step(gradient([loss], params), self.max_grad_norm):
                    raise UpdateRejectedError("the gradient of the loss is not finite")
        names = ("approx_kl", self.loss_statistic, "policy_gradient_loss", "value_loss", "entropy_loss", "loss")
        for key, column in zip(names, torch.stack(records).T.tolist(), strict=True):
            statistics[key].extend(column)
        return within_target

    def _loss(self, part: Batch) -> tuple[Tensor, Tensor]:
        """The loss on a minibatch, with its graph, and what is logged of it.

        That begins with the sampled KL estimate, the mean of (r - 1) - log r.
        """
        values, log_prob, entropy = part.evaluate_actions(self.policy)

        advantages = part.advantages
        if self.normalize_advantage and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        log_ratio = log_prob - part.old_log_prob
        ratio = torch.exp(log_ratio)
        policy_loss, statistic = self._policy_loss(part, ratio, advantages)
        value_loss = F.mse_loss(part.returns, self._clipped_values(values, part.old_values))
        entropy_loss = -torch.mean(-log_prob if entropy is None else entropy)
        # A bonus of weight zero changes no bit of the loss and its gradient, but costs a backward pass.
        weight = self.entropy_weight()
        loss = (policy_loss + weight * entropy_loss if weight else policy_loss) + self.vf_coef * value_loss

        approx_kl = (ratio.detach() - 1 - log_ratio.detach()).mean()
        losses = (each.detach() for each in (policy_loss, value_loss, entropy_loss, loss))
        return loss, torch.stack([approx_kl, statistic, *losses])

    def _clipped_values(self, values: Tensor, old_values: Tensor) -> Tensor:
        if self.clip_range_vf is None:
            return values
        bound = self._in_force(self.clip_range_vf)
        return old_values + torch.clamp(values - old_values, -bound, bound)
