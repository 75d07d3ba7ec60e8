from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from envs import RandomEnv, make
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, PPOClip, PPOPenalty, RecurrentPPOClip, RecurrentTRPO

BOTH = pytest.mark.parametrize("algorithm", [TRPO, PPOClip])
EVERY = pytest.mark.parametrize(
    "algorithm", [TRPO, NPG, PPOClip, PPOPenalty, RecurrentTRPO, RecurrentPPOClip, MaskableTRPO]
)


class Recorder(BaseCallback):
    """Writes down when it is called, and stops at a step."""

    def __init__(self, stop_at: int = 10**9) -> None:
        super().__init__()
        self.stop_at, self.events = stop_at, []

    def _on_training_start(self) -> None:
        self.events.append("training start")

    def _on_rollout_start(self) -> None:
        self.events.append("rollout start")

    def _on_step(self) -> bool:
        clipped = set() if isinstance(self.model, MaskableTRPO) else {"clipped_actions"}
        assert {"infos", "dones", "rewards", "new_obs", "actions", "n_steps"} | clipped <= set(self.locals)
        return self.num_timesteps < self.stop_at

    def _on_rollout_end(self) -> None:
        self.events.append("rollout end")

    def _on_training_end(self) -> None:
        self.events.append("training end")


@EVERY
def test_callbacks_are_called_as_sb3_calls_them(algorithm: Any) -> None:
    recorder = Recorder()
    make(algorithm).learn(64, callback=recorder)
    rollouts = ["rollout start", "rollout end"] * 2
    assert recorder.events == ["training start", *rollouts, "training end"]


@EVERY
def test_a_callback_that_returns_false_stops_training(algorithm: Any) -> None:
    recorder = Recorder(stop_at=40)
    model = make(algorithm).learn(1000, callback=recorder)
    assert model.num_timesteps == 40
    assert recorder.events == ["training start", "rollout start", "rollout end", "rollout start", "training end"]


@BOTH
def test_evaluation_checkpoints_and_stopping(algorithm: Any, tmp_path: Path) -> None:
    evaluate = EvalCallback(
        Monitor(RandomEnv()),
        callback_on_new_best=StopTrainingOnRewardThreshold(-1e9),
        eval_freq=50,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    model = make(algorithm).learn(1000, callback=[evaluate, CheckpointCallback(20, str(tmp_path), name_prefix="c")])
    assert model.num_timesteps == 50
    assert {"best_model.zip", "evaluations.npz", "c_20_steps.zip", "c_40_steps.zip"} <= {
        path.name for path in tmp_path.iterdir()
    }
    algorithm.load(tmp_path / "c_40_steps.zip", env=model.env).learn(32)


@EVERY
def test_the_progress_bar(algorithm: Any) -> None:
    make(algorithm).learn(64, progress_bar=True)


@BOTH
def test_tensorboard_and_csv_hold_the_log(algorithm: Any, tmp_path: Path) -> None:
    model = make(algorithm)
    model.set_logger(configure(str(tmp_path), ["csv", "tensorboard"]))
    model.learn(96)
    table = pd.read_csv(tmp_path / "progress.csv")
    events = EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    keys = {"train/kl_divergence_loss", "train/kl_max", "train/value_loss", "time/rollout_s", "time/policy_s"}
    for key in keys | ({"time/critic_s", "train/target_kl", "train/cg_steps"} if algorithm is TRPO else set()):
        assert key in table
        assert key in events
    assert table["train/kl_divergence_loss"].dropna().gt(0).all()


@BOTH
@pytest.mark.parametrize("wrapper", [VecNormalize, lambda env: VecFrameStack(env, 2), VecMonitor, lambda env: env])
def test_vectorised_environments(algorithm: Any, wrapper: Any) -> None:
    env = wrapper(make_vec_env(RandomEnv, n_envs=3, seed=0))
    algorithm("MlpPolicy", env, n_steps=16, batch_size=16, device="cpu").learn(96)


@BOTH
def test_environments_in_processes_of_their_own(algorithm: Any) -> None:
    env = make_vec_env(RandomEnv, n_envs=2, vec_env_cls=SubprocVecEnv)
    algorithm("MlpPolicy", env, n_steps=16, batch_size=16, device="cpu").learn(64)
    env.close()
