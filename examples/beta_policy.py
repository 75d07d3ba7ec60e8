"""An action distribution of your own: Beta, whose actions keep within their bounds (Chou et al. 2017), with its KL.

python examples/beta_policy.py
"""

import argparse
from typing import Any

from gymnasium.wrappers import RescaleAction
from numpy import float32
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, cat, exp
from torch.distributions import Beta, kl_divergence

from sb3_trpo_ext import TRPO, Family, register_distribution


class BetaDistribution(DiagGaussianDistribution):
    """Independent Betas on [0, 1] with their peaks at σ(outputs); from SB3's class it has the sums over dimensions."""

    def proba_distribution(self, mean_actions: Tensor, log_std: Tensor) -> Any:
        """Make the Betas; they narrow as log_std falls."""
        peak, narrowness = mean_actions.sigmoid(), exp(-2 * log_std)
        self.distribution: Any = Beta(1 + peak * narrowness, 1 + (1 - peak) * narrowness)
        return self


class BetaFamily(Family):
    """z = (α, β). Without it, the KL divergence would be estimated from the actions that were taken."""

    def coordinates(self, distribution: BetaDistribution) -> Tensor:
        """Read z."""
        return cat([distribution.distribution.concentration1, distribution.distribution.concentration0], dim=1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """Joint KL(old‖new) of each state, in float64, because large terms cancel."""
        old_beta, new_beta = (Beta(z[0], z[1]) for z in (old.double().chunk(2, dim=1), new.double().chunk(2, dim=1)))
        return kl_divergence(old_beta, new_beta).sum(dim=1).to(new.dtype)


register_distribution(BetaDistribution, lambda distribution: BetaFamily())


class BetaPolicy(ActorCriticPolicy):
    """SB3's policy with that distribution."""

    def _build(self, lr_schedule: Any) -> None:
        self.action_dist = BetaDistribution(self.action_space.shape[0])  # type: ignore[index]
        super()._build(lr_schedule)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=100_000, help="environment steps (default: %(default)s)")
    env = make_vec_env("Pendulum-v1", 4, seed=0, wrapper_class=lambda env: RescaleAction(env, float32(0), float32(1)))
    model = TRPO(BetaPolicy, env, n_steps=512, gamma=0.95, seed=0).learn(parser.parse_args().timesteps)
    print("After training: mean return {:.0f} ± {:.0f}".format(*evaluate_policy(model, env, n_eval_episodes=40)))
