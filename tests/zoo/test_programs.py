import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import yaml

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.zoo import ALGORITHMS as ZOO
from sb3_trpo_ext.zoo import cli

SHORT = ["--hyperparams", "n_envs:2", "n_steps:64"]


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run ``trpo-zoo`` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["trpo-zoo", *arguments])
        cli.main()

    return run


def train(zoo: Any, algo: str, env: str, steps: int, *more: str) -> None:
    options = ["-f", "logs", "-n", str(steps), "--seed", "1", "--device", "cpu", "--verbose", "0"]
    zoo("train", "--algo", algo, "--env", env, *options, *more)


def test_train_evaluate_checkpoint_enjoy_record_and_plot(zoo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = ["--eval-freq", "500", "--eval-episodes", "2", "--save-freq", "500"]
    train(zoo, "trpo", "CartPole-v1", 1000, *evaluation, "--tensorboard-log", "tb", "--progress", *SHORT)
    run = Path("logs/trpo/CartPole-v1_1")
    names = {path.name for path in run.iterdir()}
    assert names >= {"CartPole-v1.zip", "best_model.zip", "evaluations.npz", "rl_model_500_steps.zip", "0.monitor.csv"}
    assert list(Path("tb/CartPole-v1").glob("TRPO_1/events*"))
    assert yaml.safe_load((run / "CartPole-v1/config.yml").read_text().split("\n", 1)[1])
    assert type(TRPO.load(run / "CartPole-v1.zip")) is TRPO

    play = ["--algo", "trpo", "--env", "CartPole-v1", "-f", "logs", "-n", "600", "--device", "cpu", "--no-render"]
    capsys.readouterr()
    zoo("enjoy", *play, "--load-best")
    assert "Mean reward:" in capsys.readouterr().out
    zoo("enjoy", *play, "--load-last-checkpoint", "--n-envs", "2")
    zoo("record_video", "--algo", "trpo", "--env", "CartPole-v1", "-f", "logs", "-n", "20")
    (video,) = (run / "videos").glob("*.mp4")
    assert video.stat().st_size > 1000

    train(zoo, "trpo", "CartPole-v1", 1000, *evaluation, *SHORT)  # plot_from_file wants two runs
    zoo("plot_train", "-a", "trpo", "-e", "CartPole-v1", "-f", "logs", "-w", "5")
    zoo("all_plots", "-a", "trpo", "-e", "CartPole-v1", "-f", "logs", "-o", "table", "--no-display")
    assert "|CartPole-v1 |" in capsys.readouterr().out
    zoo("plot_from_file", "-i", "table.pkl", "-o", "figure.svg")
    assert "<svg" in Path("figure.svg").read_text()


@pytest.mark.parametrize("algo", ["trpo", "npg", "ppo_clip", "ppo_penalty", "trpo_lstm", "npg_lstm", "ppo_clip_lstm"])
def test_a_run_is_continued_where_it_stopped(zoo: Any, algo: str) -> None:
    settings = [*SHORT, 'learning_rate:"lin_0.001"', "normalize:True"]
    train(zoo, algo, "Pendulum-v1", 128, "--eval-freq", "-1", *settings)
    stopped = f"logs/{algo}/Pendulum-v1_1/Pendulum-v1.zip"
    train(zoo, algo, "Pendulum-v1", 256, "--eval-freq", "-1", "-i", stopped, *settings)
    from rl_zoo3 import ALGOS

    first, then = (ALGOS[algo].load(path) for path in (stopped, stopped.replace("_1/", "_2/")))
    assert then._n_updates > first._n_updates > 0
    assert then.n_steps == first.n_steps == 64
    folder = Path(f"logs/{algo}")
    counts = [statistics(folder / f"Pendulum-v1_{k}/Pendulum-v1/vecnormalize.pkl").count for k in (1, 2)]
    assert counts[1] > counts[0] > 100  # the statistics of the observations went on too


@pytest.mark.parametrize("algo", ["trpo", "trpo_lstm"])
def test_a_killed_run_goes_on_where_it_was(zoo: Any, algo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["--eval-freq", "200", "--tensorboard-log", "tb", "--progress", *SHORT, "normalize:True"]
    train(zoo, algo, "Pendulum-v1", 1024, *settings)
    update = TRPO._update

    def killed(self: TRPO) -> Any:
        if self.num_timesteps >= 512:
            raise MemoryError
        return update(self)

    monkeypatch.setattr(TRPO, "_update", killed)
    checkpoints = ["--checkpoint-dir", "checkpoints", "--checkpoint-freq", "1"]
    with pytest.raises(MemoryError):
        train(zoo, algo, "Pendulum-v1", 1024, *settings, *checkpoints)
    monkeypatch.setattr(TRPO, "_update", update)
    for _ in range(2):  # the second time it is finished
        train(zoo, algo, "Pendulum-v1", 1024, *settings, *checkpoints)
    folder = Path(f"logs/{algo}")
    runs = {path.name for path in folder.iterdir()} | {path.name for path in Path("tb/Pendulum-v1").iterdir()}
    name = {"trpo": "TRPO", "trpo_lstm": "RecurrentTRPO"}[algo]
    assert runs == {"Pendulum-v1_1", "Pendulum-v1_2", f"{name}_1", f"{name}_2"}
    whole, resumed = (folder / f"Pendulum-v1_{k}" for k in (1, 2))
    models = [ZOO[algo].load(path / "Pendulum-v1.zip", device="cpu").policy.state_dict() for path in (whole, resumed)]
    assert all(torch.equal(value, models[1][key]) for key, value in models[0].items())
    evaluations = [np.load(path / "evaluations.npz") for path in (whole, resumed)]
    assert all(np.array_equal(value, evaluations[1][key]) for key, value in evaluations[0].items())
    rows = [(path / "0.monitor.csv").read_text().splitlines()[2:] for path in (whole, resumed)]
    assert [row.split(",")[:2] for row in rows[0]] == [row.split(",")[:2] for row in rows[1]] != []


def test_checkpoints_are_for_runs_of_ours(zoo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"and not --algo a2c, got 'c'\. Leave it out"):
        train(zoo, "a2c", "CartPole-v1", 100, "--checkpoint-dir", "c")
    with pytest.raises(SystemExit):
        train(zoo, "trpo", "CartPole-v1", 100, "--checkpoint-freq", "10")
    assert "--checkpoint-freq needs a --checkpoint-dir" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        zoo("train", "--help")
    assert "--checkpoint-dir DIR" in capsys.readouterr().out


def statistics(path: Path) -> Any:
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    return VecNormalize.load(str(path), make_vec_env("Pendulum-v1")).obs_rms


def test_an_interrupted_run_is_saved(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = []
    update = TRPO._update

    def interrupted(self: TRPO) -> dict[str, float]:
        updates.append(self.num_timesteps)
        if len(updates) == 3:
            raise KeyboardInterrupt
        return update(self)

    monkeypatch.setattr(TRPO, "_update", interrupted)
    train(zoo, "trpo", "CartPole-v1", 10_000, "--eval-freq", "-1", *SHORT)
    assert TRPO.load("logs/trpo/CartPole-v1_1/CartPole-v1.zip").num_timesteps == updates[-1] == 3 * 128


@pytest.mark.parametrize("program", ["enjoy", "record_video"])
def test_masks_come_from_the_environment_that_is_played(zoo: Any, program: str, tmp_path: Path) -> None:
    (tmp_path / "masked_envs.py").write_text(MASKED)
    sys.path.insert(0, str(tmp_path))
    try:
        packages = ["--gym-packages", "masked_envs"]
        train(zoo, "trpo_mask", "Forbidding-v0", 300, "--eval-freq", "100", *packages, *SHORT)
        returns = np.load("logs/trpo_mask/Forbidding-v0_1/evaluations.npz")["results"]
        assert (returns > 0).all()  # the environment ends with -1 where a forbidden action is taken
        options = ["--algo", "trpo_mask", "--env", "Forbidding-v0", "-f", "logs", "-n", "30", "--stochastic"]
        zoo(program, *options, *(packages if program == "enjoy" else []), "--no-render")
    finally:
        sys.path.remove(str(tmp_path))


MASKED = """
import gymnasium as gym
import numpy as np


class Forbidding(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(4)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, **kwargs):
        super().reset(**kwargs)
        self.allowed = self.np_random.integers(4)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert action == self.allowed, "a forbidden action"
        self.allowed = self.np_random.integers(4)
        return self.observation_space.sample(), 1.0, bool(self.np_random.random() < 0.2), False, {}

    def render(self):
        return np.zeros((32, 32, 3), np.uint8)

    def action_masks(self):
        return np.arange(4) == self.allowed


if "Forbidding-v0" not in gym.registry:
    gym.register("Forbidding-v0", entry_point=Forbidding)
"""


def test_an_environment_without_masks_is_refused(zoo: Any) -> None:
    with pytest.raises(ValueError, match="does not support action masking"):
        train(zoo, "trpo_mask", "CartPole-v1", 100, "--eval-freq", "-1")


def test_masks_that_gymnasium_keeps_in_its_info() -> None:
    import gymnasium as gym

    from sb3_trpo_ext.zoo.wrappers import ActionMaskFromInfo

    name = max(name for name in gym.registry if name.startswith("Taxi-"))
    env = ActionMaskFromInfo(gym.make(name))
    _, info = env.reset(seed=0)
    for _ in range(20):
        assert env.action_masks().dtype == bool
        assert (env.action_masks() == info["action_mask"]).all()
        _, _, _, _, info = env.step(int(np.flatnonzero(env.action_masks())[0]))
    with pytest.raises(ValueError, match=r"needs info\['action_mask'\].*--algo trpo"):
        ActionMaskFromInfo(gym.make("CartPole-v1")).reset()


def test_two_processes_share_a_study(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    command = [sys.executable, "-m", "sb3_trpo_ext.zoo", "train", "--algo", "trpo", "--env", "CartPole-v1", "-n", "200"]
    command += ["--optimize-hyperparameters", "--storage", storage, "--study-name", "shared", "--n-trials", "2"]
    command += ["--no-optim-plots", "-f", str(tmp_path / "logs"), "--device", "cpu", "--eval-episodes", "1"]
    command += ["--hyperparams", "n_envs:1"]
    optuna.create_study(storage=storage, study_name="shared", direction="maximize")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) for _ in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    trials = optuna.load_study(storage=storage, study_name="shared").trials
    assert len(trials) == 4
    assert {trial.state.name for trial in trials} <= {"COMPLETE", "PRUNED"}


def test_environments_in_processes_of_their_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sb3_trpo_ext.zoo", "train", "--algo", "trpo", "--env", "CartPole-v1", "-n", "200"]
    command += ["--vec-env", "subproc", "--eval-freq", "-1", "-f", str(tmp_path), *SHORT]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "trpo/CartPole-v1_1/CartPole-v1.zip").exists()


def test_help_says_that_it_is_the_zoos(zoo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        with pytest.raises(SystemExit) as ended:
            zoo(*arguments)
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        assert "The programs of the RL Zoo (rl_zoo3) as they are" in printed
        assert all(program in printed for program in cli.PROGRAMS)
    with pytest.raises(SystemExit):
        zoo("train", "--help")
    printed = capsys.readouterr().out
    assert printed.startswith("This is the RL Zoo's train")
    assert "trpo_mask" in printed and "--optimize-hyperparameters" in printed and "usage: trpo-zoo train" in printed


def test_an_unknown_program_is_named_with_those_that_there_are(zoo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        zoo("trian")
    assert ended.value.code == 2
    assert "'trian' (choose from" in capsys.readouterr().err


def test_the_other_algorithms_of_the_zoo_run_as_before(zoo: Any) -> None:
    train(zoo, "a2c", "CartPole-v1", 100, "--eval-freq", "-1")
    assert Path("logs/a2c/CartPole-v1_1/CartPole-v1.zip").exists()
