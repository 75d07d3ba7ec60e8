"""Trust-region policy optimisation for Stable-Baselines3."""

from sb3_trpo_ext.critic import register_critic
from sb3_trpo_ext.critic.base import Critic
from sb3_trpo_ext.maskable import MaskableTRPO
from sb3_trpo_ext.npg import NPG
from sb3_trpo_ext.policy.distributions import Family, register_distribution
from sb3_trpo_ext.ppo_clip import PPOClip
from sb3_trpo_ext.ppo_penalty import PPOPenalty
from sb3_trpo_ext.recurrent import RecurrentNPG, RecurrentPPOClip, RecurrentTRPO
from sb3_trpo_ext.rollout.action_values import ActionValues
from sb3_trpo_ext.training.communicator import WorkerError, initialize_workers
from sb3_trpo_ext.training.worker_callbacks import every_rank, main_only
from sb3_trpo_ext.trpo import TRPO

__version__ = "0.2.0"

__all__ = [
    "NPG",
    "TRPO",
    "ActionValues",
    "Critic",
    "Family",
    "MaskableTRPO",
    "PPOClip",
    "PPOPenalty",
    "RecurrentNPG",
    "RecurrentPPOClip",
    "RecurrentTRPO",
    "WorkerError",
    "__version__",
    "every_rank",
    "initialize_workers",
    "main_only",
    "register_critic",
    "register_distribution",
]
