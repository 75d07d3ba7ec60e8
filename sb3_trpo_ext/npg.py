"""Natural Policy Gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_trpo_ext.core.arguments import check_number, check_schedule
from sb3_trpo_ext.core.natural_step import Direction, backtrack, boundary_scale
from sb3_trpo_ext.policy.problem import PolicyEvaluation, PolicyProblem
from sb3_trpo_ext.training.natural_gradient import NaturalGradientAlgorithm, PolicyStep


class NPG(NaturalGradientAlgorithm):
    """Natural Policy Gradient (Kakade 2002), its direction truncated after a few conjugate-gradient steps.

    Each update is θ ← θ_old + α F⁻¹∇L, with α = sqrt(2δ / gᵀF⁻¹g) at the boundary of the quadratic trust region
    ("truncated natural policy gradient" in Duan et al. 2016, https://arxiv.org/abs/1604.06778), or with ``step_size``
    the fixed α of Kakade, which maximises gᵀs - 1/(2α) sᵀFs. It is `TRPO` without the line search: cheaper by a few
    forward passes, and nothing keeps the true KL divergence below δ. An update that is not finite leaves the policy as
    it was, bit for bit.

    Args:
        policy: The policy class, or ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"``.
        env: The environment, or its Gymnasium id.
        step_size: α > 0, a float or a schedule of the remaining progress, in place of ``target_kl``. None scales to
            the boundary.
        _init_setup_model: Build the networks at construction.
        **kwargs: Those of `TRPO` but for the line search's, ``trust_region``, ``kl_penalty``, ``momentum``,
            ``sample_reuse`` and ``final_n_steps``. Without a line search the radius of ``target_kl_std`` bounds the
            part of σ in the KL divergence exactly, and that of ``target_kl`` the mean's in the quadratic model.

    Raises:
        TypeError: For an unknown argument; one of TRPO's or PPO's is answered with what to use instead.
        ValueError: If an argument is out of range.
    """

    refused_arguments: ClassVar[Mapping[str, str]] = {
        **NaturalGradientAlgorithm.refused_arguments,
        **dict.fromkeys(
            ("line_search_shrinking_factor", "line_search_max_iter", "line_search_accept_ratio"),
            "it has no line search: use the class TRPO",
        ),
        "trust_region": "without a line search only the quadratic model of the mean KL bounds it: use the class TRPO",
        "sample_reuse": "the bound on the KL divergence that it needs is kept by a line search: use the class TRPO",
        "final_n_steps": "its rollouts keep their length: use the class TRPO",
        "momentum": "it falls back on the plain direction where a line search fails: use the class TRPO",
        "kl_penalty": "its penalised form is `step_size` = 1 / kl_penalty",
    }

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int = 2048,
        batch_size: int = 128,
        gamma: float = 0.99,
        *,
        step_size: float | Schedule | None = None,
        target_kl: float | Schedule = 0.01,
        cg_max_steps: int = 15,
        cg_damping: float = 0.1,
        sub_sampling_factor: int = 1,
        gae_lambda: float = 0.95,
        normalize_advantage: bool = True,
        n_critic_updates: int = 10,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        _init_setup_model: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            gamma=gamma,
            target_kl=target_kl,
            cg_max_steps=cg_max_steps,
            cg_damping=cg_damping,
            sub_sampling_factor=sub_sampling_factor,
            gae_lambda=gae_lambda,
            normalize_advantage=normalize_advantage,
            n_critic_updates=n_critic_updates,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            **kwargs,
        )
        self.step_size = step_size
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if self.step_size is not None:
            check_schedule("step_size", self.step_size, positive=True, hint="Pass None to scale to `target_kl`.")

    def _cures(self) -> str:
        cures = super()._cures()
        return cures if self.step_size is None else cures.replace("`target_kl`", "`step_size`")

    def _policy_step(self, problem: PolicyProblem) -> PolicyStep:
        direction = self._direction(problem)  # x ≈ F⁻¹g
        if not direction.is_usable:
            return self._no_direction(problem, direction)
        size = self._step_size(direction)
        step = self._spread(problem).step(direction, size)  # log σ, if it has a radius of its own, or a lowest value
        return backtrack(step.problem, step.direction, size, _rejection, max_steps=1)

    def _step_size(self, direction: Direction) -> float:
        """α in force."""
        if self.step_size is None:
            return boundary_scale(direction.boundary_curvature, self.trust_region_radius())
        return check_number("step_size", self._current_value(self.step_size))


def _rejection(evaluation: PolicyEvaluation, fraction: float) -> str:
    finite = math.isfinite(evaluation.objective) and math.isfinite(evaluation.divergence)
    return "" if finite else "the objective or the KL divergence there is not finite"
