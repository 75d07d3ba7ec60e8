"""What the RL Zoo is told of our algorithms."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, PPOClip, PPOPenalty, RecurrentNPG, RecurrentPPOClip, RecurrentTRPO

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {
    "trpo": TRPO,
    "npg": NPG,
    "ppo_clip": PPOClip,
    "ppo_penalty": PPOPenalty,
    "trpo_lstm": RecurrentTRPO,
    "npg_lstm": RecurrentNPG,
    "ppo_clip_lstm": RecurrentPPOClip,
    "trpo_mask": MaskableTRPO,
}
"""Names in the zoo, as for ``--algo``. ``trpo`` takes the place of sb3-contrib's."""

OLDEST_ZOO = (2, 8)


def register() -> None:
    """Put `ALGORITHMS` into rl_zoo3: classes, Optuna samplers and converters, and the packaged hyperparameter files.

    Afterwards ``rl_zoo3.ALGOS`` has them, and ``rl_zoo3.exp_manager.ExperimentManager`` reads our hyperparameter files
    for them unless another is given. What the zoo does with its other algorithms stays as it is. Calling it again
    changes nothing; it does not matter which modules of rl_zoo3 were imported before.

    Raises:
        ImportError: If rl_zoo3 is not installed, or older than 2.8.
    """
    _check_version()
    import rl_zoo3
    from rl_zoo3 import hyperparams_opt

    from sb3_trpo_ext.zoo import experiment, masks
    from sb3_trpo_ext.zoo.samplers import CONVERTERS, SAMPLERS

    rl_zoo3.ALGOS.update({**ALGORITHMS, "trpo_mask": masks.PlayableMaskableTRPO})
    hyperparams_opt.HYPERPARAMS_SAMPLER.update(SAMPLERS)
    hyperparams_opt.HYPERPARAMS_CONVERTER.update(CONVERTERS)
    _replace("ExperimentManager", experiment.TrustRegionExperimentManager)
    _replace("EvalCallback", masks.MaskAwareEvalCallback)
    _replace("TrialEvalCallback", masks.MaskAwareTrialEvalCallback)
    _replace("create_test_env", masks.create_test_env)


def _check_version() -> None:
    cure = 'Use `pip install "sb3-trpo-ext[zoo]"`.'
    try:
        found = version("rl_zoo3")
    except PackageNotFoundError as error:
        raise ImportError(f"The RL Zoo (rl_zoo3) is not installed. {cure}") from error
    if tuple(map(int, found.split(".")[:2])) < OLDEST_ZOO:
        oldest = ".".join(map(str, OLDEST_ZOO))
        raise ImportError(f"rl_zoo3 {found} is too old: {oldest} or newer is needed. {cure}")


def _replace(name: str, replacement: Any) -> None:
    """Let every module of the zoo that has imported a name of it see its replacement."""
    for module in [module for key, module in sys.modules.items() if key.split(".")[0] == "rl_zoo3"]:
        if name in vars(module):
            setattr(module, name, replacement)
