"""The RL Zoo's experiment manager, taught what our hyperparameter files hold."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, ClassVar

import optuna
import torch.distributed as dist
from gymnasium import spaces
from rl_zoo3 import ALGOS
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import get_class_by_name
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import ProgressBarCallback
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext import initialize_workers
from sb3_trpo_ext.zoo.registry import ALGORITHMS
from sb3_trpo_ext.zoo.samplers import DISCRETE_ACTIONS

HYPERPARAMETERS = Path(__file__).parent / "hyperparams"

LAST_FRACTION = {"target_kl": 0.01, "target_kl_std": 0.01, "step_size": 0.01, "ent_coef": 0.0, "log_std": None}
"""Our arguments that take schedules, and the fraction of x at which ``lin_x`` ends: a trust region stays positive, and
there is no fraction of a logarithm."""

WORDS = {"log_std": ("learned", "fixed")}
"""What such an argument may be that is no schedule."""


SHARED = {"npg_lstm": "trpo_lstm"}
"""Algorithms whose entries are another's."""


LOG_FOLDER = "log-folder.txt"
"""Where a directory of checkpoints keeps the name of the run's folder among the zoo's logs."""


def hyperparameters_of(algo: str) -> Path:
    """The packaged file of an algorithm, if there is one."""
    return HYPERPARAMETERS / f"{SHARED.get(algo, algo)}.yml"


class TrustRegionExperimentManager(ExperimentManager):
    """The zoo's manager, with what hyperparameter files of ours need.

    - Our files are the default for our algorithms.
    - ``target_kl``, ``target_kl_std``, ``step_size`` and ``ent_coef`` take schedules: ``lin_0.01`` falls to nearly
      nothing, ``lin_0.02_0.005`` from the first number to the second, as that of ``log_std`` has to: ``lin_-0.5_-1.5``.
    - ``policy: auto`` is ``MlpPolicy``, ``CnnPolicy`` or ``MultiInputPolicy``, by what the environment shows.
    - Started by ``torchrun``, its processes train one agent: the first one has the folder, evaluates and saves, every
      so many steps of all of them together, and its seed is that of all.
    - ``policy_kwargs`` may be a mapping, in which classes are written as names: ``activation_fn: torch.nn.ReLU``. (An
      expression in a string works as in the zoo.)

    Args:
        args: As in the zoo.
        algo: As in the zoo.
        *others: As in the zoo.
        config: As in the zoo; for our algorithms, None is the file packaged with them.
        **kwargs: As in the zoo.

    Attributes:
        checkpoints: What ``learn`` is given as ``checkpoint_dir`` and ``checkpoint_freq``, if anything. A run that is
            resumed logs into the folder that it had.
    """

    checkpoints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, args: argparse.Namespace, algo: str, *others: Any, config: str | None = None, **kwargs: Any
    ) -> None:
        packaged = hyperparameters_of(algo)
        self._ours = packaged.exists()
        if config is None and self._ours:
            config = str(packaged)
        self._rank, self._workers = initialize_workers() if self._ours else (0, 1)
        if self._workers > 1:
            if kwargs.get("seed") is not None:
                kwargs["seed"] = of_the_first(kwargs["seed"])
            if self._rank == 0:
                args.seed = kwargs.get("seed", getattr(args, "seed", None))
        super().__init__(args, algo, *others, config=config, **kwargs)  # type: ignore[misc]  # others end before it
        if self._workers > 1 and self.optimize_hyperparameters:
            raise ValueError(
                "`--optimize-hyperparameters` tries one agent after the other in one process, and this is one of "
                f"{self._workers} that torchrun started. Start it without torchrun; several share a study by --storage."
            )

        if self.checkpoints:
            self._check_checkpoints()
            self._reuse_log_folder()

    def _check_checkpoints(self) -> None:
        if self.optimize_hyperparameters or self.algo not in ALGORITHMS:
            what = "a search for hyperparameters" if self.optimize_hyperparameters else f"--algo {self.algo}"
            raise ValueError(
                f"--checkpoint-dir keeps runs of the algorithms of sb3-trpo-ext, and not {what}, got "
                f"{str(self.checkpoints['checkpoint_dir'])!r}. Leave it out."
            )

    def _reuse_log_folder(self) -> None:
        """Log where the run has logged before, if it is among the runs of the same folder."""
        name = Path(self.checkpoints["checkpoint_dir"]) / LOG_FOLDER
        if name.is_file() and (Path(self.log_path) / name.read_text()).is_dir():
            self.save_path = os.path.join(self.log_path, name.read_text())
            self.params_path = f"{self.save_path}/{self.env_name}"

    def create_log_folder(self) -> None:
        """As in the zoo, by the first worker; its name is kept with the checkpoints."""
        if self._rank:
            return
        super().create_log_folder()
        if self.checkpoints:
            directory = Path(self.checkpoints["checkpoint_dir"])
            directory.mkdir(parents=True, exist_ok=True)
            (directory / LOG_FOLDER).write_text(Path(self.save_path).name)

    def learn(self, model: BaseAlgorithm) -> None:
        """As in the zoo, with the checkpoints that the command line asks for."""
        super().learn(_WithCheckpoints(model, self) if self.checkpoints else model)  # type: ignore[arg-type]

    def create_callbacks(self) -> None:
        """As in the zoo, for the first worker, who counts its own steps."""
        if self._rank == 0:
            self.save_freq = self.save_freq // self._workers if self.save_freq > 0 else self.save_freq
            self.eval_freq = max(self.eval_freq // self._workers, 1) if self.eval_freq > 0 else self.eval_freq
            super().create_callbacks()

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """As in the zoo; the first worker's alone write files."""
        return super().create_envs(n_envs, eval_env, no_log or self._rank > 0)

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        """As in the zoo, by the first worker."""
        if self._rank == 0:
            super().save_trained_model(model)

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        if self._rank == 0:
            super()._save_config(saved_hyperparams)

    def _preprocess_schedules(self, hyperparams: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        if self._ours:
            for name, last in LAST_FRACTION.items():
                if isinstance(hyperparams.get(name), str) and hyperparams[name] not in WORDS.get(name, ()):
                    hyperparams[name] = linear(name, hyperparams[name], last)
        return super()._preprocess_schedules(hyperparams)

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> Any:
        if isinstance(hyperparams.get("policy_kwargs"), dict):
            hyperparams["policy_kwargs"] = {
                name: get_class_by_name(value) if isinstance(value, str) and "." in value else value
                for name, value in hyperparams["policy_kwargs"].items()
            }
        return super()._preprocess_hyperparams(hyperparams)

    def _preprocess_action_noise(
        self, hyperparams: dict[str, Any], saved_hyperparams: dict[str, Any], env: VecEnv
    ) -> dict[str, Any]:
        """The zoo's first look at the environment: where a policy that depends on it can be chosen."""
        self._discrete_actions = isinstance(env.action_space, spaces.Discrete)
        if hyperparams.get("policy") == "auto":
            hyperparams["policy"] = policy_for(ALGOS[self.algo], env.observation_space)
        found = super()._preprocess_action_noise(hyperparams, saved_hyperparams, env)
        if self._ours and hyperparams.get("use_sde"):
            self.n_actions = 0  # by which our samplers know that there is a σ for them to choose
        return found

    def objective(self, trial: optuna.Trial) -> float:
        """As in the zoo; the trial knows whether actions may have a value each."""
        trial.set_user_attr(DISCRETE_ACTIONS, self._discrete_actions)
        return super().objective(trial)


class _WithCheckpoints:
    """A model as the zoo's ``learn`` uses it.

    Args:
        model: The model.
        manager: Whose checkpoints.
    """

    def __init__(self, model: BaseAlgorithm, manager: TrustRegionExperimentManager) -> None:
        self.env, self._model, self._manager = model.env, model, manager

    def learn(self, total_timesteps: int, **kwargs: Any) -> None:
        self._model.learn(total_timesteps, **kwargs, **self._manager.checkpoints)
        # The zoo ends a bar that a run which was finished before has not begun.
        callbacks = self._manager.callbacks
        if callbacks and isinstance(callbacks[0], ProgressBarCallback) and not hasattr(callbacks[0], "pbar"):
            del callbacks[0]


def of_the_first(value: Any) -> Any:
    """What the first of the processes that torchrun started has."""
    values = [value]
    dist.broadcast_object_list(values, group=dist.new_group(backend="gloo"))
    return values[0]


def policy_for(algorithm: type[BaseAlgorithm], observations: spaces.Space[Any]) -> str:
    """What ``policy: auto`` stands for: the alias of the algorithm's policy for Dict observations, images or others."""
    kind = "Cnn" if is_image_space(observations) else "Mlp"
    kind = "MultiInput" if isinstance(observations, spaces.Dict) else kind
    return next(alias for alias in algorithm.policy_aliases if alias.startswith(kind))


def linear(name: str, text: str, last_fraction: float | None) -> LinearSchedule:
    """``lin_x`` or ``lin_x_y``: from x at the start of training to a fraction of it, or y, at the end.

    Args:
        name: The argument.
        text: What the file has.
        last_fraction: The fraction; None where both numbers are needed.

    Raises:
        ValueError: If the text is anything else.
    """
    kind, *numbers = text.split("_")
    try:
        first, *last = map(float, numbers)
    except ValueError:
        kind = ""
    if kind != "lin" or len(last) > 1 or (not last and last_fraction is None):
        example = "lin_0.01" if last_fraction is not None else "lin_-0.5_-1.5"
        also = "".join(f"{word!r}, " for word in WORDS.get(name, ())) or "a number, "
        raise ValueError(f"`{name}` must be {also}or a schedule like {example!r}, got {text!r}.")
    return LinearSchedule(first, last[0] if last else (last_fraction or 0.0) * first, 1.0)
