"""Trust-region policy optimisation for Stable-Baselines3."""

from sb3_trpo_ext.ppo_clip import PPOClip
from sb3_trpo_ext.trpo import TRPO

__version__ = "0.1.0"

__all__ = ["TRPO", "PPOClip", "__version__"]
