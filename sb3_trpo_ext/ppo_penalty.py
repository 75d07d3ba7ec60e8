"""Proximal Policy Optimization, adaptive KL penalty."""

from __future__ import annotations

import math
from typing import Any

import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule
from torch import Tensor

from sb3_trpo_ext.core.arguments import check_number, check_radius
from sb3_trpo_ext.core.objectives import (
    adapted_penalty,
    bounded_penalty,
    importance_sampled_surrogate,
    searched_penalty,
)
from sb3_trpo_ext.policy.problem import PolicyEvaluation, PolicyOutput
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.rollout.buffers import VIEWED_BUFFERS
from sb3_trpo_ext.training.base import UpdateRejectedError, plain
from sb3_trpo_ext.training.first_order import Ascent, FirstOrderAlgorithm, PolicyDivergedError
from sb3_trpo_ext.training.minibatch_kernel import Loss, unclipped
from sb3_trpo_ext.training.transaction import Attributes, Restorable

LARGEST_KL_COEF = torch.finfo(torch.float32).max ** 0.25
"""(β·‖∇KL‖)² must not overflow, which leaves β and ‖∇KL‖ the fourth root of the largest float32 each."""

SMALLEST_KL_COEF = torch.finfo(torch.float32).tiny


class PPOPenalty(FirstOrderAlgorithm):
    """Proximal Policy Optimization with a KL penalty (Schulman et al. 2017, https://arxiv.org/abs/1707.06347).

    Minibatch ascent on E[r·Â] - β E[KL(π_old(·|s)‖π_θ(·|s))] (equation 8) less ``vf_coef`` times the value loss plus
    ``ent_coef`` times the entropy. The KL divergence is the exact joint one of whole distributions, not an estimate
    from the actions that were taken. After an update that moved the policy by d, β is halved if d < d_targ / 1.5 and
    doubled if d > 1.5 d_targ (section 4); d is measured on the whole rollout. β is saved with the model
    (``model.kl_coef``). An update is atomic.

    In the paper no update is undone. Here an epoch that ``max_kl`` rolled back counts as d = ∞, and so does an update
    that was undone because the policy or its part of the gradient was not finite: β is doubled. Where nothing of an
    update was kept and β is the largest already, it is halved, and on and on in that direction until an update
    succeeds, so that β can leave any range in which none does. What the critic or an interrupt brought down leaves β
    as it was.

    Args:
        policy: The policy class, or ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"``.
        env: The environment, or its Gymnasium id.
        learning_rate: Step size, a float or a schedule of the remaining progress.
        n_steps: Steps of each environment in a rollout.
        batch_size: Minibatch size.
        n_epochs: Passes over the rollout in an update.
        gamma: Discount factor.
        gae_lambda: λ of generalised advantage estimation (Schulman et al. 2016).
        target_kl: d_targ, a float or a schedule of the remaining progress.
        kl_coef: β of the first update. At most 4.3e9, the fourth root of the largest float32, so that the norm of the
            penalty's gradient does not overflow.
        adaptive: Adapt β; False keeps it, within the bounds or not, at 0 too.
        kl_coef_bounds: Smallest, > 0, and largest β; ``math.inf`` is 4.3e9. With a large one, β can grow in a phase
            when the KL divergence does not answer to it until it stops all learning.
        clip_range_vf: Clipping of the value function, a float or a schedule; None for none.
        normalize_advantage: Standardise Â over each minibatch.
        ent_coef: Weight of the entropy bonus, a float or a schedule of the remaining progress.
        vf_coef: Weight of the value loss.
        max_grad_norm: Largest norm of a gradient; longer ones are scaled down.
        use_sde: Use generalised state-dependent exploration (gSDE).
        sde_sample_freq: Steps between new gSDE noise matrices; -1 for one a rollout.
        rollout_buffer_class: SB3's ``RolloutBuffer`` or ``DictRolloutBuffer``; None chooses by the observation space.
        rollout_buffer_kwargs: Its further arguments.
        stats_window_size: Episodes in the logged means.
        tensorboard_log: Directory for TensorBoard; None for none.
        policy_kwargs: Further arguments of the policy.
        verbose: 0 silent, 1 info, 2 debug.
        seed: Seed of all random generators.
        device: ``"cpu"``, ``"cuda"``, ``"auto"``, ...
        max_kl: Bound on the exact mean joint KL(π_old‖π_θ) over the rollout: an epoch that leaves this ball is rolled
            back, optimiser included, and ends the update. None for no bound.
        critic: ``"value"``, V(s) as in SB3, or ``"action_value"``, a value Q(s,a) for each of the Discrete actions
            (`ActionValues`), whose loss is that of the actions taken.
        bootstrap: What is expected to follow a state, where the critic has action values: ``"expected"``, or ``"max"``;
            see `TRPO`.
        surrogate: Where the critic has action values, ``"expected"`` makes of the policy's loss the sum over actions
            Σ_a π_old(a|s) r A, with A(s,·) of the critic as it is at the minibatch; ``"sampled"`` goes by the
            actions taken.
        log_std: Who sets log σ of Gaussian actions (Box, without gSDE). ``"learned"``: the policy gradient, from
            policy_kwargs' ``log_std_init`` on, as in SB3; it falls because less noise pays at once, too early for some
            tasks and too late for others. ``"fixed"``: it stays what ``log_std_init`` made it. A schedule of the
            remaining progress, ``LinearSchedule(-0.5, -1.5, 1.0)`` say, is log σ itself: it is set before each rollout,
            for the rollout and its update, whatever ``load`` or ``set_parameters`` brought, and ``learn`` leaves that
            of the last rollout. A σ that is fixed or scheduled is no part of the update: its ``param.grad`` is None,
            and Adam does not move it. To change who sets it, pass another ``log_std`` to ``load``.
        log_std_min: Lowest log σ where it is learnt; None for none. Every step is projected onto it.
        fast_rollouts: Collect without calling the policy's modules where these are plain layers on the CPU
            (``rollout_path`` tells): the same random numbers, actions, buffers and callbacks as SB3's own loop, up to
            the last bits of float32, in a third of its time. ``"exact"`` has the last bits too and takes somewhat
            longer; False is SB3's own loop.
        fast_updates: Compute updates without autograd where the policy is of plain layers on the CPU (``update_path``
            tells): the same numbers up to the rounding of float32, in a fraction of the time. False is autograd.
        distributed: Where ``torchrun`` started this process beside others, train one model together with them. The
            script stays as it is: each process has environments of its own, ``n_envs`` and ``n_steps`` are those of
            one process, and ``batch_size``, ``total_timesteps`` and ``num_timesteps`` are of all. W processes with E
            environments each take the update of one process with W·E. Environment i of process r has the seed of
            environment r·E + i. Process 0 writes logs and files and runs SB3's callbacks; see `main_only` and
            `every_rank`. False trains each process by itself.
        _init_setup_model: Build the networks at construction.

    Raises:
        AssertionError: If advantages are normalised over a single sample, as in SB3's PPO.
        ValueError: If an argument is out of range.
    """

    loss_statistic = "kl_penalty"
    loss_needs_old_z = True

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        target_kl: float | Schedule = 0.01,
        kl_coef: float = 1.0,
        adaptive: bool = True,
        kl_coef_bounds: tuple[float, float] = (1e-3, 1e3),
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float | Schedule = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            n_epochs=n_epochs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            clip_range_vf=clip_range_vf,
            normalize_advantage=normalize_advantage,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            **kwargs,
        )
        self.target_kl = target_kl
        self.kl_coef = kl_coef
        self.adaptive = adaptive
        self.kl_coef_bounds = kl_coef_bounds
        self._search_factor = 2.0

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        self.target_kl = FloatSchedule(plain(self.target_kl))
        low, high = self.kl_coef_bounds
        self.kl_coef_bounds = (low, high)  # a list, if it comes from a file

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_radius("target_kl", self.target_kl, hint="0.01 is a usual target.")
        low, high = _checked_bounds(self.kl_coef_bounds, smallest=SMALLEST_KL_COEF if self.adaptive else 0.0)
        beta = check_number("kl_coef", self.kl_coef)
        if self.adaptive and not low <= beta <= high:
            raise ValueError(
                f"`kl_coef` must lie within `kl_coef_bounds` {self.kl_coef_bounds}, got {self.kl_coef}. Change either, "
                "or pass adaptive=False for a β that stays."
            )
        if beta > LARGEST_KL_COEF:
            raise ValueError(
                f"`kl_coef` must be at most {LARGEST_KL_COEF:.3g}, got {self.kl_coef}: beyond, the gradient of the "
                "penalty overflows float32. Choose a smaller one."
            )

        if self.rollout_buffer_class is not None and self.rollout_buffer_class not in VIEWED_BUFFERS:
            known = ", ".join(kind.__name__ for kind in VIEWED_BUFFERS)
            raise ValueError(
                f"`rollout_buffer_class` must be one of {known}, got {self.rollout_buffer_class.__name__}: PPOPenalty "
                "keeps the distribution of each sample by its place in the buffer. Use PPOClip with another buffer."
            )

    def _cures(self) -> str:
        return f"a larger `kl_coef`, {super()._cures()}"

    def _policy_loss(self, part: Batch, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        output = PolicyOutput.after_evaluation(self.policy, part)
        assert part.old_z is not None  # see _prepared
        mean = part.reduction.mean
        divergence = mean(output.family.kl(part.old_z, output.z))
        penalty = self.kl_coef * divergence if self.kl_coef else torch.zeros_like(divergence)  # it may be infinite
        surrogate = part.over_actions(importance_sampled_surrogate(ratio, advantages))
        return penalty - mean(surrogate), penalty.detach()

    def _loss_by_hand(self) -> Loss:
        return Loss(unclipped, kl_weight=self.kl_coef)

    def _log_entries(self, evaluation: PolicyEvaluation) -> dict[str, float]:
        return {
            "train/kl_coef": self.kl_coef,
            "train/target_kl": self._target(),
            **super()._log_entries(evaluation),
        }

    def _adapt(self, ascent: Ascent) -> None:
        if self.kl_coef and math.isnan(ascent.evaluation.divergence):
            raise PolicyDivergedError("the KL divergence that the update reached is not a number")
        if not self.adaptive:
            return
        if ascent.reason:
            self._search()
            return
        rolled_back = self.max_kl is not None and not ascent.reached <= self.max_kl
        reached = math.inf if rolled_back else ascent.reached
        self.kl_coef = bounded_penalty(adapted_penalty(self.kl_coef, reached, self._target()), *self._bounds())
        self._search_factor = 2.0

    def _after_rejection(self, rejection: UpdateRejectedError) -> None:
        if self.adaptive and isinstance(rejection, PolicyDivergedError):
            self._search()

    def _search(self) -> None:
        """Another β after an update of which nothing was kept."""
        self.kl_coef, self._search_factor = searched_penalty(self.kl_coef, self._search_factor, *self._bounds())

    def _bounds(self) -> tuple[float, float]:
        """Smallest and largest β in force."""
        low, high = self.kl_coef_bounds
        return low, min(high, LARGEST_KL_COEF)

    def _target(self) -> float:
        """d_targ in force."""
        return check_number("target_kl", self._current_value(self.target_kl), positive=True)

    def _shared_attributes(self) -> tuple[str, ...]:
        return (*super()._shared_attributes(), "kl_coef", "_search_factor")

    def _checkpoints(self) -> tuple[Restorable, ...]:
        return *super()._checkpoints(), Attributes(self, "kl_coef", "_search_factor")


def _checked_bounds(bounds: Any, smallest: float) -> tuple[float, float]:
    """The smallest and the largest β, or `ValueError` if there can be none between them or one below ``smallest``."""
    try:
        low, high = (float(bound) for bound in bounds)
    except (TypeError, ValueError):
        low = high = math.nan
    if not smallest <= low <= min(high, LARGEST_KL_COEF):
        raise ValueError(
            f"`kl_coef_bounds` must be two numbers, 0 < smallest <= largest, got {bounds!r}: a β of 0 could never rise "
            f"again. The smallest may be {SMALLEST_KL_COEF:.3g} to {LARGEST_KL_COEF:.3g}; (1e-3, 1e3) is usual."
        )
    return low, high
