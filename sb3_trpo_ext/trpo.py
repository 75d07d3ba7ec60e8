"""Trust Region Policy Optimization."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import Tensor

from sb3_trpo_ext.core.arguments import check_fraction, check_integer, check_number
from sb3_trpo_ext.core.natural_step import Acceptance, backtrack
from sb3_trpo_ext.core.objectives import theoretical_penalty
from sb3_trpo_ext.policy.problem import PolicyProblem
from sb3_trpo_ext.policy.regions import LargestRegion, MeanRegion, Penalty
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.rollout.buffers import VIEWED_BUFFERS
from sb3_trpo_ext.rollout.past_rollouts import shared_radius
from sb3_trpo_ext.training.arguments import check_rollout_size
from sb3_trpo_ext.training.natural_gradient import NaturalGradientAlgorithm, PolicyStep
from sb3_trpo_ext.training.transaction import Attributes, Restorable


class TRPO(NaturalGradientAlgorithm):
    """Trust Region Policy Optimization (Schulman et al. 2015, https://arxiv.org/abs/1502.05477).

    Each update maximises the surrogate L(θ) = E[π_θ(a|s)/π_old(a|s) · Â] under E_s[KL(π_old(·|s)‖π_θ(·|s))] <= δ
    (equation 14): x ≈ F⁻¹∇L by conjugate gradients with Fisher-vector products, a step of x to the boundary
    ½ sᵀFs = δ, and backtracking until L improves inside the region (appendix C). An update that cannot be accepted
    leaves the policy as it was, bit for bit. So does a rollout whose advantages are all equal up to rounding.

    After an update ``param.grad`` of every parameter that the policy's output reaches holds -∇L at θ_old (the gradient
    of a loss, as a backward pass of SB3's PPO leaves it), also where the update was rejected; of the others, and of
    a σ that is not learnt, None.

    A drop-in for ``sb3_contrib.TRPO``: its arguments come first, with its names, order and defaults. The KL divergence
    that is computed, constrained and logged is the *joint* one, summed over action dimensions.

    Args:
        policy: The policy class, or ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"``.
        env: The environment, or its Gymnasium id.
        learning_rate: Step size of the Adam critic, a float or a schedule of the remaining progress.
        n_steps: Steps of each environment in a rollout; n_steps * n_envs must exceed 1.
        batch_size: Minibatch size of the Adam critic.
        gamma: Discount factor.
        cg_max_steps: Most conjugate-gradient iterations.
        cg_damping: λ, added to the diagonal of the Fisher matrix; see ``kl_per_action_dim``.
        line_search_shrinking_factor: Factor in (0, 1) between trial steps.
        line_search_max_iter: Most trial steps.
        n_critic_updates: Epochs of the Adam critic.
        gae_lambda: λ of generalised advantage estimation (Schulman et al. 2016).
        use_sde: Use generalised state-dependent exploration (gSDE).
        sde_sample_freq: Steps between new gSDE noise matrices; -1 for one a rollout.
        rollout_buffer_class: Rollout buffer class; None chooses by the observation space.
        rollout_buffer_kwargs: Its further arguments.
        normalize_advantage: Standardise Â over the rollout.
        target_kl: δ > 0, a float or a schedule of the remaining progress; see ``kl_per_action_dim``.
        sub_sampling_factor: k: the Fisher matrix is estimated from a k-th of the samples; gradient and line search see
            all. See ``curvature_samples``.
        stats_window_size: Episodes in the logged means.
        tensorboard_log: Directory for TensorBoard; None for none.
        policy_kwargs: Further arguments of the policy.
        verbose: 0 silent, 1 info, 2 debug.
        seed: Seed of all random generators.
        device: ``"cpu"``, ``"cuda"``, ``"auto"``, ...
        critic: ``"gauss_newton"``, Hessian-free, without a learning rate (`GaussNewtonCritic`), or ``"adam"``,
            minibatch regression as in sb3-contrib (``learning_rate``, ``batch_size``, ``n_critic_updates``).
            ``"auto"`` is the first, unless one of the arguments of the second is not at its default: what was tuned
            for sb3-contrib keeps its meaning. Also a name given to `register_critic`, or a subclass of `Critic`.
            ``"action_value"`` gives the policy a value for each of its Discrete actions, Q(s,·) in place of V(s)
            (`ActionValues`), regressed on the λ-returns of the actions taken; ``gae_lambda=0`` is the lecture's step.
            ``"semi_gradient"`` takes the lecture's steps along the temporal differences instead (`SemiGradientCritic`).
            It learns CartPole-v1 as quickly as V does, and more alike from seed to seed; elsewhere there is little
            between them (``examples/benchmarks``, "Values of actions").
        critic_kwargs: Further arguments of the critic. ``n_rollouts``, of both: M, it is fitted on the last M rollouts,
            those before the newest with the targets of V-trace for the policy as it is (`GaussNewtonCritic` says what
            that costs and keeps; not for recurrent policies or rollout buffers of one's own). ``gae_lambda``, of both:
            the λ of the returns that V is fitted to, where that of the advantages is another. Of the Gauss-Newton
            critic: ``damping``, ``cg_steps``, ``n_iterations``, ``max_backtracks``, ``curvature_samples``. The longer
            the horizon, the smaller the differences between actions beside the value: for γ near one solve it further
            (``damping`` 1e-4, ``cg_steps`` 30, ``n_iterations`` 3, ``curvature_samples`` None), as the entry of
            Swimmer-v5 in ``zoo/hyperparams`` does.
            Of action values ``fit`` names how they are fitted, ``"auto"``, ``"gauss_newton"`` (by default with
            ``damping`` 1e-3, ``cg_steps`` 20, ``n_iterations`` 2, ``curvature_samples`` None), ``"adam"`` or
            ``"semi_gradient"``, and the others are arguments of that.
        bootstrap: What is expected to follow a state, where the critic has action values: ``"expected"``,
            Σ_a π(a|s) Q(s,a), or ``"max"``, max_a Q(s,a), as in the boxes of the lecture CS885 (University of Waterloo,
            2020). The second is no value of π, so that the surrogate matches the return to first order only where π is
            optimal (``examples/tabular_theory.py``: a third of the gradient is off).
        surrogate: Where the critic has action values, ``"expected"`` makes L(θ) the sum over actions of equation 9,
            E_s[Σ_a π_θ(a|s) A(s,a)] with A = Q - Σ_a π_old Q, exact, for the gradient, the line search and the penalty;
            the critic then learns of a rollout before the policy does. ``"sampled"`` is equation 14: the actions taken.
        kl_per_action_dim: Read ``target_kl`` and ``cg_damping`` per action dimension for Box and MultiBinary actions
            of A dimensions: δ = target_kl · A and λ = cg_damping · A. That is what averaging the KL over dimensions
            amounts to in sb3-contrib, so steps keep their length there and here. False is the paper's
            δ = target_kl. ``train/target_kl`` logs δ.
        ent_coef: Weight of an entropy bonus, in the gradient and in the line search; a float or a schedule.
        trust_region: ``"mean"`` bounds the mean KL divergence over the states of the rollout by δ (equation 12, what
            the paper does); ``"max"`` bounds the largest (equation 11), which makes shorter steps.
            ``train/kl_max`` shows the difference.
        kl_penalty: C > 0: maximise L(θ) - C · max_s KL(π_old(·|s)‖π_θ(·|s)) instead of bounding the KL divergence
            (equations 9 and 10). ``"theory"`` is C = 4εγ/(1-γ)² with ε = max |Â|, for which every exact step improves
            the return. It is not meant for training: at γ = 0.99 a step of δ = 0.01 is 150 times longer in small MDPs
            (``examples/tabular_theory.py``) and 100 000 times and more on Hopper-v5, where the theory's drowns in the
            rounding of float32.
        momentum: μ in [0, 1): ascend F⁻¹m in place of F⁻¹∇L, with m = ∇L + μ·m_previous (heavy ball, Polyak 1964; in
            policy gradients, Huang et al. 2020, https://arxiv.org/abs/2007.06680). The noise of one rollout's gradient,
            not the solver, limits a step; m averages it over about 1/(1-μ) rollouts. Where its full step leaves
            the trust region or does not improve the surrogate, m is forgotten and the plain direction is taken.
            Successive steps are alike, so that noise alone drifts (1+μ)/(1-μ) times as far in KL: lower ``target_kl``
            with it. ``train/momentum`` logs the μ of the step taken. m belongs to an environment and a policy: it is
            forgotten by ``set_env`` with another environment, ``set_parameters`` and ``load``, and where the policy was
            replaced or its parameters were changed by anything but an update.
        sample_reuse: M: the policy step sees the last M rollouts, with the exact ratios to the policies that made them
            (equation 10 with q = these) and advantages estimated again by V-trace (GeTRPO, Queeney et al. 2022,
            https://arxiv.org/abs/2206.13714). δ is divided by ((M+1)/2)², so that a sample is left as far in all as
            without reuse. Fewer ``n_steps`` make use of it. The rollouts are forgotten as the m of ``momentum`` is, and
            their observations keep the normalisation that they had.
        final_n_steps: Steps of each environment in the last rollout of ``learn``: rollouts grow (or shrink)
            geometrically from ``n_steps`` to it with the progress of training. Small rollouts make many steps while the
            gradient is large, large ones average its noise away when it is small (Byrd et al. 2012,
            https://doi.org/10.1007/s10107-012-0572-5). None keeps ``n_steps``.
        log_std: Who sets log σ of Gaussian actions (Box, without gSDE). ``"learned"``: the policy gradient, from
            policy_kwargs' ``log_std_init`` on, as in SB3; it falls because less noise pays at once, too early for some
            tasks and too late for others. ``"fixed"``: it stays what ``log_std_init`` made it. A schedule of the
            remaining progress, ``LinearSchedule(-0.5, -1.5, 1.0)`` say, is log σ itself: it is set before each rollout,
            for the rollout and its update, whatever ``load`` or ``set_parameters`` brought, and ``learn`` leaves that
            of the last rollout. A σ that is fixed or scheduled is no part of the update: its ``param.grad`` is None,
            and KL divergence, radius and gradient are the mean's. Momentum goes on over a schedule's small changes, and
            the ratios of ``sample_reuse`` are to the policies that acted, each with its own σ. To change who sets it,
            pass another ``log_std`` to ``load``.
        log_std_min: Lowest log σ where it is learnt; None for none. No trial of the line search is below it, and a
            dimension that is there and pulled further leaves its share of the radius to the others.
        target_kl_std: A radius of its own for σ, a float or a schedule, per action dimension as ``target_kl`` is; None
            lets it share that one. The Fisher matrix has a block of the mean's parameters and one of log σ, which is
            2I, and zeros between them, so that both steps are natural ones: the mean's to δ, and that of log σ, half
            its gradient, to ``target_kl_std``. The line search keeps the mean's part of the KL divergence below the
            first and that of σ below the second, in its exact form. ``train/target_kl_std`` logs the radius,
            ``train/kl_std`` what was used of it. A small one slows σ down without holding it.
        curvature_samples: Most samples, drawn at random from the rollout, that the Fisher matrix and the matrix of the
            Gauss-Newton critic are estimated from. None for all.
        fisher_chunk_size: Most samples in one forward pass of the update; bounds its memory. ``"auto"`` measures what
            a sample costs and keeps the graphs within 512 MiB; None for all at once.
        cg_residual_tol: Conjugate gradients stop at this relative residual.
        min_radius_used: u in [0, 1]. Damping shortens the step to the boundary: it uses the share
            xᵀFx / xᵀ(F + λI)x of δ, and with K actions, where the entries of F are about 1/K, a tenth of it at K = 100
            and a hundredth at K = 1000. Where that share is below u, the step (not its direction) is scaled to use u of
            δ in the quadratic model. 0 leaves damping its way, as sb3-contrib does; 1 measures the boundary without it,
            so that the line search has to shorten many steps. ``"auto"`` is 0.6 for discrete, multi-discrete and
            multi-binary actions, and 0 for Box; 0.6 is recommended for a Box of more than ten dimensions. With hundreds
            of actions a smaller ``cg_damping`` makes a better direction too.
        line_search_accept_ratio: Fraction in [0, 1) of the predicted improvement that a step must bring; 0 accepts
            any improvement.
        fast_rollouts: Collect without calling the policy's modules where these are plain layers on the CPU
            (``rollout_path`` tells): the same random numbers, actions, buffers and callbacks as SB3's own loop, up to
            the last bits of float32, in a third of its time. ``"exact"`` has the last bits too and takes somewhat
            longer; False is SB3's own loop.
        fast_updates: Compute updates without autograd where the policy is of plain layers on the CPU (``update_path``
            tells): the same numbers up to the rounding of float32, in a fraction of the time. False is autograd.
        distributed: Where ``torchrun`` started this process beside others, train one model together with them. The
            script stays as it is: each process has environments of its own, ``n_envs`` and ``n_steps`` are those of
            one process, and ``total_timesteps``, ``num_timesteps``, ``curvature_samples`` and ``batch_size`` are of
            all. W processes with E environments each take the update of one process with W·E. Environment i of
            process r has the seed of environment r·E + i. Process 0 writes logs and files and runs SB3's callbacks;
            see `main_only` and `every_rank`. False trains each process by itself.
        _init_setup_model: Build the networks at construction.

    Raises:
        AssertionError: If n_steps * n_envs = 1 with normalised advantages, as in SB3's PPO.
        TypeError: For an unknown argument; one of PPO's is answered with what to use instead.
        ValueError: If an argument is out of range, or does not go with the actions or the policy.
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int = 2048,
        batch_size: int = 128,
        gamma: float = 0.99,
        cg_max_steps: int = 15,
        cg_damping: float = 0.1,
        line_search_shrinking_factor: float = 0.8,
        line_search_max_iter: int = 10,
        n_critic_updates: int = 10,
        gae_lambda: float = 0.95,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = True,
        target_kl: float | Schedule = 0.01,
        sub_sampling_factor: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        trust_region: Literal["mean", "max"] = "mean",
        kl_penalty: float | Literal["theory"] | None = None,
        momentum: float = 0.0,
        sample_reuse: int = 1,
        final_n_steps: int | None = None,
        line_search_accept_ratio: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            gamma=gamma,
            cg_max_steps=cg_max_steps,
            cg_damping=cg_damping,
            n_critic_updates=n_critic_updates,
            gae_lambda=gae_lambda,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            normalize_advantage=normalize_advantage,
            target_kl=target_kl,
            sub_sampling_factor=sub_sampling_factor,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            **kwargs,
        )
        self.trust_region = trust_region
        self.kl_penalty = kl_penalty
        self.momentum = momentum
        self.sample_reuse = sample_reuse
        self.final_n_steps = final_n_steps
        self.gradient_memory: np.ndarray | None = None
        self.line_search_shrinking_factor = line_search_shrinking_factor
        self.line_search_max_iter = line_search_max_iter
        self.line_search_accept_ratio = line_search_accept_ratio

        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_fraction("momentum", self.momentum, include_zero=True)
        check_integer("sample_reuse", self.sample_reuse, hint="1 uses every rollout once.")
        if self.sample_reuse > 1 and self.rollout_buffer_class not in (None, *VIEWED_BUFFERS):
            raise ValueError(
                f"`sample_reuse` needs the arrays of SB3's own rollout buffers, got {self.sample_reuse} with "
                f"rollout_buffer_class={self.rollout_buffer_class!r}. Leave out one of the two."
            )
        if self.final_n_steps is not None:
            check_integer("final_n_steps", self.final_n_steps, hint="Pass None for rollouts of one length.")
            if self.env is not None:
                check_rollout_size(self.final_n_steps, self.n_envs, normalize_advantage=self.normalize_advantage)
        check_integer("line_search_max_iter", self.line_search_max_iter)
        check_fraction("line_search_shrinking_factor", self.line_search_shrinking_factor)
        check_fraction("line_search_accept_ratio", self.line_search_accept_ratio, include_zero=True)
        if self.trust_region not in ("mean", "max"):
            raise ValueError(f"`trust_region` must be 'mean' or 'max', got {self.trust_region!r}.")
        if self.kl_penalty not in ("theory", None):
            check_number(
                "kl_penalty",
                self.kl_penalty,
                positive=True,
                hint="Pass 'theory' for C = 4εγ/(1-γ)², or None for a trust region.",
            )
        if self.kl_penalty == "theory" and not 0 < self.gamma < 1:
            raise ValueError(
                f"kl_penalty='theory' is 4εγ/(1-γ)², which means nothing at gamma={self.gamma}. Pass a gamma between 0 "
                "and 1, or a number."
            )

    def _steps_of_rollout(self, asked: int) -> int:
        return self.rollout_steps()

    def rollout_steps(self) -> int:
        """Steps of each environment in the next rollout: ``n_steps``, or on the way to ``final_n_steps``."""
        if self.final_n_steps is None:
            return self.n_steps
        return round(self.n_steps * (self.final_n_steps / self.n_steps) ** self._rollout_progress())

    def _checkpoints(self) -> tuple[Restorable, ...]:
        return (*super()._checkpoints(), Attributes(self, "gradient_memory"))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "gradient_memory"]

    def _shared_attributes(self) -> tuple[str, ...]:
        return (*super()._shared_attributes(), "gradient_memory")

    def _forget_past_updates(self) -> None:
        """Drop momentum too, which counts on a gradient that has hardly turned."""
        super()._forget_past_updates()
        self.gradient_memory = None

    def _rollouts_seen(self) -> int:
        return max(self.sample_reuse, super()._rollouts_seen())

    def _remembers(self) -> bool:
        return bool(self.momentum) or super()._remembers()

    def trust_region_radius(self) -> float:
        """δ in force: the bound on the joint KL divergence, in nats."""
        return shared_radius(super().trust_region_radius(), self.sample_reuse)

    def spread_radius(self) -> float | None:
        """δ_σ in force: the bound on the part of σ in the KL divergence, in nats; None where it shares δ."""
        radius = super().spread_radius()
        return None if radius is None else shared_radius(radius, self.sample_reuse)

    def _policy_step(self, problem: PolicyProblem) -> PolicyStep:
        """A full step along the heavy ball's direction; the plain step where there is none or that is rejected.

        A fraction of it would keep the ball rolling where it has overshot: the gradient has turned, the memory has not.
        """
        gradient, memory = problem.gradient, self.gradient_memory
        step = None
        if memory is not None and memory.shape == gradient.shape:
            heavy_ball = gradient + self.momentum * torch.as_tensor(memory).to(gradient)
            step = self._step_along(problem, heavy_ball, most_trials=1)
        if step is None or step.reason:
            step = self._step_along(problem, gradient, most_trials=self.line_search_max_iter)
        self.gradient_memory = None
        if self.momentum and not step.reason and step.direction:
            self.gradient_memory = step.direction.vector.cpu().numpy()
        return step

    def _step_along(self, problem: PolicyProblem, vector: Tensor, most_trials: int) -> PolicyStep:
        """The update of the paper's appendix C along F⁻¹v: v is the gradient, or the heavy ball."""
        direction = self._direction(problem, vector)  # x ≈ F⁻¹v
        if not direction.is_usable:
            return self._no_direction(problem, direction)
        region = self._region(problem)
        size = region.full_step(problem, direction)  # ½ sᵀFs = δ
        step = self._spread(problem).step(direction, size)  # log σ, if it has a radius of its own, or a lowest value
        test = Acceptance(region, problem.start, size * step.direction.slope, self.line_search_accept_ratio)
        return backtrack(  # θ_old + β^k s where L improves and D <= δ, otherwise θ_old
            step.problem,
            step.direction,
            size,
            step.rejection(test),
            shrink=self.line_search_shrinking_factor,
            max_steps=most_trials,
        )

    def _region(self, problem: PolicyProblem) -> MeanRegion:
        """What the line search keeps to."""
        theory = self.kl_penalty == "theory"
        penalty = theoretical_penalty(self.gamma, problem.max_advantage) if theory else self.kl_penalty
        if penalty:  # without any advantage the theory has no bound for an entropy bonus
            return Penalty(penalty=float(penalty))
        kind = LargestRegion if self.trust_region == "max" else MeanRegion
        return kind(self.trust_region_radius())

    def _policy_samples(self, batch: Batch, chunk_size: int | None) -> Batch:
        """The rollout, and those of the last policies as the policy sees them now."""
        return self._with_past(batch, self.sample_reuse, chunk_size, self.gae_lambda)

    def _cures(self) -> str:
        cures = super()._cures()
        if not self.kl_penalty:
            return cures
        penalty = "a number for `kl_penalty`" if self.kl_penalty == "theory" else "a larger `kl_penalty`"
        return cures.replace("a smaller `target_kl`", penalty)

    def _log_entries(self, problem: PolicyProblem, step: PolicyStep) -> dict[str, float]:
        record = {"train/is_line_search_success": float(not step.reason), "train/step_fraction": step.fraction}
        if self.momentum:
            rolls = step.direction is not None and step.direction.vector is not problem.gradient
            record["train/momentum"] = self.momentum if rolls else 0.0
        return super()._log_entries(problem, step) | record
