"""A run that was killed goes on from its last checkpoint as if nothing had happened, or says why it does not."""

import copy
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, OBSERVATION_SPACES, RandomEnv
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, PPOClip, PPOPenalty, RecurrentNPG, RecurrentPPOClip, RecurrentTRPO
from sb3_trpo_ext.rollout.env_state import layers, put_into, taken_from, why_not_exact
from sb3_trpo_ext.training import checkpoint, checkpoint_files
from sb3_trpo_ext.training.checkpoint_files import DamagedError

TOTAL, STEPS = 320, 32
CALL = {"total_timesteps": TOTAL, "checkpoint_freq": 1}
CLASSES = [TRPO, NPG, PPOClip, PPOPenalty, RecurrentTRPO, RecurrentNPG, RecurrentPPOClip, MaskableTRPO]


class KilledError(Exception):
    """Stands for the end of the process."""


class Kill(BaseCallback):
    """Ends a run in the middle of a rollout, and draws from the generators that nothing else draws from."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.at = at

    def _on_step(self) -> bool:
        random.random()
        self.model.action_space.sample()
        if self.at and self.num_timesteps >= self.at:
            raise KilledError
        return True


class Listing(KVWriter):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        times = ("time/fps", "time/time_elapsed", "time/rollout_s", "time/policy_s", "time/critic_s")
        self.rows.append({"step": step} | {key: value for key, value in key_values.items() if key not in times})


class MaskedEnv(RandomEnv):
    """A task of the user's, with masks, that hands over its state."""

    def get_checkpoint_state(self) -> Any:
        return self._time, self._rng, self.observation_space.np_random, self._allowed

    def set_checkpoint_state(self, state: Any) -> None:
        self._time, self._rng, generator, self._allowed = state
        self.observation_space._np_random = generator


def masked() -> gym.Env:
    return MaskedEnv(gym.spaces.Box(-1, 1, (5,)), gym.spaces.Discrete(4))


def build(algorithm: Any, env: Any = "CartPole-v1", normalize: bool = False, **kwargs: Any) -> Any:
    """A small model in a process of its own, as far as it can tell."""
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(int(time.time_ns()) % 2**31)
    made = make_vec_env(masked if algorithm is MaskableTRPO else env, n_envs=2)
    made = VecNormalize(made) if normalize else made
    kind = "MlpLstmPolicy" if algorithm.__name__.startswith("Recurrent") else "MlpPolicy"
    if kind == "MlpLstmPolicy":
        kwargs.setdefault("policy_kwargs", {"lstm_hidden_size": 8})
    model = algorithm(kind, made, **{"n_steps": STEPS, "device": "cpu", "seed": 3, **kwargs})
    model.set_logger(Logger(None, [Listing()]))
    return model


def rows_of(model: Any) -> list[dict[str, Any]]:
    """What a model logged."""
    return model.logger.output_formats[0].rows


def all_of(model: Any) -> dict[str, str]:
    """Everything that must be the same, as texts."""
    statistics = model.get_vec_normalize_env()
    found = {
        **{f"policy.{name}": value.numpy() for name, value in model.policy.state_dict().items()},
        "gradients": [None if param.grad is None else param.grad.numpy() for param in model.policy.parameters()],
        "optimiser": [
            {name: np.asarray(value) for name, value in state.items()}
            for state in model.policy.optimizer.state_dict()["state"].values()
        ],
        "generators": (random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()),
        "space": repr(model.action_space.np_random.bit_generator.state),
        "observation": np.asarray(model._last_obs),
        "starts": model._last_episode_starts,
        "counters": (model.num_timesteps, model._n_updates, model._episode_num, model._num_timesteps_at_start),
        "episodes": [(each["r"], each["l"]) for each in model.ep_info_buffer],
        "memory": getattr(model, "gradient_memory", None),
        "beta": getattr(model, "kl_coef", None),
        "hidden": [np.asarray(each) for pair in getattr(model, "_last_lstm_states", None) or () for each in pair],
        "statistics": statistics and (vars(statistics.obs_rms), vars(statistics.ret_rms)),
        "returns": statistics and statistics.returns,
        "past rollouts": [
            (each.rewards, each.starts, each.batch.old_log_prob.numpy())
            for each in getattr(model, "_past_rollouts", ())
        ],
        "parameters left": None if getattr(model, "_theta_left", None) is None else model._theta_left.numpy(),
    }
    return {name: repr(bits(value)) for name, value in found.items()}


def bits(value: Any) -> Any:
    """A value with its arrays and floats as they are in memory."""
    if isinstance(value, (np.ndarray, np.generic, float)):
        return np.asarray(value).tobytes()
    if isinstance(value, dict):
        return {key: bits(each) for key, each in value.items()}
    return [bits(each) for each in value] if isinstance(value, (list, tuple)) else value


def require_same(model: Any, other: Any) -> None:
    mine, theirs = all_of(model), all_of(other)
    assert [name for name in theirs if mine[name] != theirs[name]] == []


def killed(make: Callable[[], Any], at: int, folder: Path, callback: Any = None, **kwargs: Any) -> Any:
    """A run whose process ends in the middle of a rollout."""
    callbacks = [*([callback] if callback else []), Kill(at)]
    model = make()
    with pytest.raises(KilledError):
        model.learn(
            **{"total_timesteps": TOTAL, "checkpoint_dir": folder, "checkpoint_freq": 1, **kwargs}, callback=callbacks
        )
    return model


def resumed(make: Callable[[], Any], folder: Path, callback: Any = None, **kwargs: Any) -> Any:
    return make().learn(
        **{**CALL, "checkpoint_dir": folder, **kwargs}, callback=[*([callback] if callback else []), Kill()]
    )


def uninterrupted(make: Callable[[], Any], callback: Any = None, **kwargs: Any) -> Any:
    return make().learn(TOTAL, callback=[*([callback] if callback else []), Kill()], **kwargs)


# Bit for bit

ARMS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{f"{kind.__name__}": (kind, {}) for kind in CLASSES},
    "normalized": (TRPO, {"normalize": True, "env": "Pendulum-v1"}),
    "normalized ppo": (PPOClip, {"normalize": True, "env": "Pendulum-v1", "learning_rate": lambda p: 1e-3 * p}),
    "penalty": (PPOPenalty, {"env": "Pendulum-v1", "target_kl": 1e-4}),
    "recurrent": (RecurrentTRPO, {"normalize": True, "env": "Pendulum-v1"}),
    "mujoco": (TRPO, {"normalize": True, "env": "Hopper-v5"}),
    "momentum": (TRPO, {"momentum": 0.5, "env": "Pendulum-v1", "critic": "adam", "batch_size": 16}),
    "reuse": (TRPO, {"sample_reuse": 3, "env": "Pendulum-v1"}),
    "critic of three": (TRPO, {"critic_kwargs": {"n_rollouts": 3}, "env": "Pendulum-v1", "normalize": True}),
    "adam of three": (NPG, {"critic": "adam", "batch_size": 16, "critic_kwargs": {"n_rollouts": 3}}),
    "growing": (TRPO, {"final_n_steps": 64, "target_kl": lambda p: 0.01 * p + 0.001}),
    "gsde": (TRPO, {"use_sde": True, "sde_sample_freq": 4, "env": "Pendulum-v1"}),
    "exact": (TRPO, {"fast_rollouts": "exact"}),
    "action values": (TRPO, {"critic": "action_value", "bootstrap": "max", "surrogate": "expected"}),
    "action values ppo": (PPOClip, {"critic": "action_value", "surrogate": "expected"}),
    "sb3's way": (PPOClip, {"fast_rollouts": False, "fast_updates": False}),
}


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_that_is_killed_twice_ends_as_one_that_is_not(arm: str, tmp_path: Path) -> None:
    algorithm, options = ARMS[arm]

    def make() -> Any:
        return build(algorithm, **options)

    whole = uninterrupted(make)
    expected = all_of(whole)
    first, second = killed(make, 120, tmp_path), killed(make, 250, tmp_path)
    model = resumed(make, tmp_path)
    assert [name for name, value in all_of(model).items() if value != expected[name]] == []
    # What was logged too, iterations included: each process goes on with the row after its checkpoint.
    rows = {row["step"]: row for each in (first, second, model) for row in rows_of(each)}
    assert repr([rows[step] for step in sorted(rows)]) == repr(rows_of(whole))


class Look(BaseCallback):
    """Looks at a model where a rollout begins."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, dict[str, str]] = {}

    def _on_rollout_start(self) -> None:
        self.found[self.model.num_timesteps] = all_of(self.model)

    def _on_step(self) -> bool:
        return True


class Retuned(BaseCallback):
    """Changes how the critic is fitted, once."""

    def _on_rollout_start(self) -> None:
        if self.num_timesteps == 64:
            self.model.critic_kwargs = {"cg_steps": 2}

    def _on_step(self) -> bool:
        return True


def test_arguments_that_were_changed_on_the_way_stay_changed(tmp_path: Path) -> None:
    expected = all_of(uninterrupted(lambda: build(TRPO), Retuned()))
    killed(lambda: build(TRPO), 150, tmp_path, Retuned())
    model = resumed(lambda: build(TRPO), tmp_path, Retuned())
    assert [name for name, value in all_of(model).items() if value != expected[name]] == []


@pytest.mark.parametrize("arm", ["momentum", "recurrent", "normalized ppo"])
def test_all_is_as_it_was_where_the_next_rollout_begins(arm: str, tmp_path: Path) -> None:
    algorithm, options = ARMS[arm]
    looks = [Look() for _ in range(3)]
    uninterrupted(lambda: build(algorithm, **options), looks[0])
    killed(lambda: build(algorithm, **options), 200, tmp_path, looks[1])
    resumed(lambda: build(algorithm, **options), tmp_path, looks[2])
    assert sorted(looks[2].found) == [0, 64, 128, 192, 256]  # what it had seen before came back too
    for steps, found in looks[2].found.items():
        assert [name for name, value in looks[0].found[steps].items() if found[name] != value] == []


CLASSIC = ["CartPole-v1", "Pendulum-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Acrobot-v1"]
TOYS = ["FrozenLake-v1", "CliffWalking-v1", "Blackjack-v1"]
MUJOCO = [name for name, spec in gym.registry.items() if name.endswith("-v5") and "mujoco" in str(spec.entry_point)]


@pytest.mark.parametrize("name", [*CLASSIC, *TOYS, *MUJOCO])
def test_environments_go_on_exactly(name: str) -> None:
    def make() -> gym.Env:
        return Monitor(gym.make(name, max_episode_steps=30))

    env, other = make(), make()
    assert why_not_exact(env) == ""
    env.reset(seed=5)
    env.action_space.seed(6)
    other.reset(seed=7)
    for _ in range(20):  # some of the way into an episode
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    put_into(other, taken_from(env))
    for _ in range(60):
        actions = [each.action_space.sample() for each in (env, other)]
        assert repr(bits(actions[0])) == repr(bits(actions[1]))
        steps = [each.step(actions[0]) for each in (env, other)]
        for mine, theirs in zip(*steps, strict=True):
            assert repr(bits(without_time(mine))) == repr(bits(without_time(theirs)))
        if steps[0][2] or steps[0][3]:
            mine, theirs = (each.reset() for each in (env, other))
            assert repr(bits(mine)) == repr(bits(theirs))


def without_time(value: Any) -> Any:
    """An info without the seconds that a Monitor counts."""
    return (
        {**value, "episode": {**value["episode"], "t": 0}} if isinstance(value, dict) and "episode" in value else value
    )


def test_there_are_mujoco_tasks() -> None:
    assert len(MUJOCO) >= 10


# Killed for real


def in_a_child(target: Callable[[], None], seconds: float | None = None, number: int = signal.SIGKILL) -> int | None:
    """Run something in a process of its own, which a signal may end; its exit code."""
    child = multiprocessing.get_context("fork").Process(target=target)
    child.start()
    if seconds is not None:
        child.join(seconds)
        if child.is_alive():
            os.kill(child.pid, number)
    child.join(60)
    return child.exitcode


def finishing(make: Callable[[], Any], checkpoints: Path, result: Path, total: int = TOTAL, **kwargs: Any) -> Callable:
    """A program: train to the end, and say what came of it."""

    def program() -> None:
        model = make()
        arguments = {"checkpoint_dir": checkpoints, "checkpoint_freq": 1, "callback": Kill(), **kwargs}
        model.learn(total, **arguments)
        partial = result.with_suffix(".partial")  # it may be killed while it writes this too
        partial.write_text(json.dumps(all_of(model)))
        partial.replace(result)

    return program


@pytest.fixture(scope="module")
def warm() -> None:
    """Import here what training imports, and not in each child."""
    build(TRPO).learn(STEPS)


@pytest.mark.usefixtures("warm")
def test_ten_kills_at_random_moments(tmp_path: Path) -> None:
    def make() -> Any:
        return build(TRPO, "Pendulum-v1", normalize=True)

    whole, result = tmp_path / "whole.json", tmp_path / "result.json"
    assert in_a_child(finishing(make, tmp_path / "w", whole, 2048)) == 0
    moments, kills = random.Random(0), 0
    while not result.exists():
        code = in_a_child(finishing(make, tmp_path / "checkpoints", result, 2048), moments.uniform(0.1, 0.5))
        kills += code == -signal.SIGKILL
        assert kills < 100
    assert json.loads(result.read_text()) == json.loads(whole.read_text())
    assert kills >= 3
    left = [path.name for path in (tmp_path / "checkpoints").rglob("*") if "unfinished" in path.name]
    assert left == []


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("call", ["fsync", "replace", "unlink", "rmdir", "mkdir", "write"])
def test_killed_while_a_checkpoint_is_written(call: str, tmp_path: Path) -> None:
    """At the first, the second, ... call of the system that writing makes, the first checkpoint's included."""

    def make() -> Any:
        return build(TRPO)

    whole, result = tmp_path / "whole.json", tmp_path / "result.json"
    assert in_a_child(finishing(make, tmp_path / "w", whole, 192)) == 0
    owner = {"fsync": os, "replace": os, "write": HalfWritten}.get(call, Path)

    def killed_at(count: int) -> Callable[[], None]:
        def program() -> None:
            warnings.simplefilter("error")  # nothing may look damaged
            left, original = iter(range(count)), getattr(owner, call)

            def deadly(*args: Any, **kwargs: Any) -> Any:
                if next(left, None) is None:
                    if call == "write":
                        original(args[0], args[1][: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            setattr(owner, call, deadly)
            checkpoint_files.open = HalfWritten  # type: ignore[attr-defined]
            finishing(make, tmp_path / "c", result, 192)()

        return program

    codes = [in_a_child(killed_at(count)) for count in (0, 0, 1, 2, 3, 4)]
    assert -signal.SIGKILL in codes and {*codes} <= {-signal.SIGKILL, 0}
    assert in_a_child(killed_at(10_000)) == 0
    assert json.loads(result.read_text()) == json.loads(whole.read_text())
    assert len(list((tmp_path / "c").rglob("manifest.json"))) <= 3  # one that was about to be removed


class HalfWritten(io.FileIO):
    """A file whose ``write`` goes to the disk at once."""


SCRIPT = """
import sys
from sb3_trpo_ext import TRPO
from stable_baselines3.common.callbacks import BaseCallback

class Ready(BaseCallback):
    def _on_step(self):
        if self.num_timesteps == 100:
            print("ready", flush=True)
        return True

model = TRPO("MlpPolicy", "CartPole-v1", n_steps=64, seed=0, device="cpu")
model.learn(int(sys.argv[1]), checkpoint_dir=sys.argv[2], callback=Ready())
print("the end", model.num_timesteps)
"""


def test_sigterm_ends_the_program_after_the_update(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, "10000000", str(tmp_path)]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert program.stdout is not None and program.stdout.readline() == "ready\n"
    program.send_signal(signal.SIGTERM)
    said = program.communicate(timeout=60)[0]
    assert program.returncode == 0
    assert "SIGTERM" in said and str(tmp_path) in said and "the end" not in said
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert int(folder.name) % 64 == 0 and int(folder.name) >= 128


def test_sigterm_is_only_heard_while_learning(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        own = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            build(TRPO).learn(TOTAL, checkpoint_dir=tmp_path, callback=Terminate())
        assert ended.value.code == 0 and heard == []
        assert signal.getsignal(signal.SIGTERM) is own
        model = resumed(lambda: build(TRPO), tmp_path)
        assert model.num_timesteps == TOTAL and signal.getsignal(signal.SIGTERM) is own
        build(TRPO).learn(STEPS, callback=Terminate())
        assert heard == [signal.SIGTERM]  # without a directory it is whoever else's
        thread = threading.Thread(target=lambda: build(TRPO).learn(64, checkpoint_dir=tmp_path / "other"))
        thread.start()
        thread.join()
        assert (tmp_path / "other" / "000000000064").exists()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_may_have_ended_the_environments_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class TerminateAll(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 40:
                os.kill(os.getpid(), signal.SIGTERM)
                for worker in env.processes:
                    worker.kill()
            return True

    env = SubprocVecEnv([lambda: gym.make("CartPole-v1")] * 2, start_method="fork")
    model = TRPO("MlpPolicy", env, n_steps=STEPS, device="cpu", seed=0)
    with pytest.raises(SystemExit) as ended:
        model.learn(TOTAL, checkpoint_dir=tmp_path, checkpoint_freq=1, callback=TerminateAll())
    assert ended.value.code == 0
    assert "The checkpoint at 64 timesteps is in" in capsys.readouterr().out


class Terminate(BaseCallback):
    def _on_step(self) -> bool:
        if self.n_calls == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return True


# What a run is


def test_a_finished_run_returns_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts: list[Counting] = [Counting(), Counting()]
    model = resumed(lambda: build(TRPO), tmp_path, counts[0])
    again = resumed(lambda: build(TRPO), tmp_path, counts[1])
    require_same(again, model)
    assert counts[0].seen == counts[1].seen and counts[1].steps == 0  # its state came back, and nothing called it
    assert "nothing is left to do" in capsys.readouterr().out


class Counting(BaseCallback):
    """Has a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.steps = [0.0], 0
        self._lock = threading.Lock()  # which cannot be pickled

    def _on_training_start(self) -> None:
        self.seen.append(np.random.random())  # a callback may do what it likes

    def _on_step(self) -> bool:
        self.seen.append(float(self.locals["rewards"].sum()))
        return True


def test_a_larger_total_goes_on_and_a_smaller_one_is_reached(tmp_path: Path) -> None:
    resumed(lambda: build(TRPO), tmp_path)
    longer = resumed(lambda: build(TRPO), tmp_path, total_timesteps=2 * TOTAL)
    require_same(longer, build(TRPO).learn(2 * TOTAL, callback=[Kill()]))
    for total in (float(TOTAL), np.int64(TOTAL)):
        other = tmp_path / str(total)
        killed(lambda: build(TRPO), 150, other, total_timesteps=total, checkpoint_freq=np.int64(64))
        assert resumed(lambda: build(TRPO), other, total_timesteps=total).num_timesteps == TOTAL
    smaller = resumed(lambda: build(TRPO), tmp_path, total_timesteps=TOTAL)
    assert smaller.num_timesteps == 2 * TOTAL


def test_continued_training_has_a_directory_for_each_call(tmp_path: Path) -> None:
    def program(at: int = 0) -> Any:
        model = build(TRPO)
        callback = [Kill(at)]
        for name in ("first", "second"):
            model.learn(
                192,
                callback=callback,
                reset_num_timesteps=name == "first",
                checkpoint_dir=tmp_path / str(bool(at or again)) / name,
                checkpoint_freq=1,
            )
        return model

    again = False
    whole = all_of(program())
    with pytest.raises(KilledError):
        program(at=300)
    again = True
    model = program()
    assert model.num_timesteps == 384 and all_of(model) == whole
    with pytest.raises(ValueError, match="began at 192 timesteps, and this one begins at 0"):
        build(TRPO).learn(192, checkpoint_dir=tmp_path / "True" / "second")


def test_a_callback_that_stops_can_be_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped() -> Any:
        return build(TRPO).learn(
            100_000, callback=StopTrainingOnMaxEpisodes(8), checkpoint_dir=tmp_path, checkpoint_freq=1
        )

    first = stopped()
    assert "A callback stopped the run" in capsys.readouterr().out
    require_same(stopped(), first)


@pytest.mark.parametrize("log_interval", [3, None])
def test_the_log_keeps_its_phase(log_interval: int | None, tmp_path: Path) -> None:
    whole = uninterrupted(lambda: build(TRPO), log_interval=log_interval)
    killed(lambda: build(TRPO), 150, tmp_path, log_interval=log_interval)
    model = resumed(lambda: build(TRPO), tmp_path, log_interval=log_interval)
    expected = [row for row in rows_of(whole) if row["step"] > 150]
    assert repr(rows_of(model)) == repr(expected)
    assert model.logger.name_to_value.keys() == whole.logger.name_to_value.keys()


def test_writing_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", 0.0)
    without = uninterrupted(lambda: build(TRPO, "Pendulum-v1", normalize=True))
    expected = all_of(without)
    with_ = uninterrupted(lambda: build(TRPO, "Pendulum-v1", normalize=True), checkpoint_dir=tmp_path)
    assert all_of(with_) == expected
    assert repr(rows_of(with_)) == repr(rows_of(without))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000256", "000000000320"]  # the last two
    assert not hasattr(with_, "__run") and with_._run is None


def test_frequency_counts_timesteps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    original = checkpoint_files.CheckpointFolder.write_part
    monkeypatch.setattr(
        checkpoint_files.CheckpointFolder,
        "write_part",
        lambda self, steps, part: written.append(steps) or original(self, steps, part),
    )
    build(TRPO).learn(640, checkpoint_dir=tmp_path / "a", checkpoint_freq=150)
    assert written == [192, 320, 512, 640]
    written.clear()
    build(TRPO).learn(640, checkpoint_dir=tmp_path / "b")  # in less than 30 seconds
    assert written == [640]


# Callbacks and logs


def with_callbacks(folder: Path) -> Any:
    on_best = StopTrainingOnNoModelImprovement(max_no_improvement_evals=100)
    evaluation = EvalCallback(
        VecNormalize(make_vec_env("CartPole-v1", n_envs=1, seed=9)),
        callback_after_eval=on_best,
        callback_on_new_best=CheckpointCallback(1, str(folder), "best"),
        eval_freq=20,
        n_eval_episodes=2,
        deterministic=False,
        log_path=str(folder),
        verbose=0,
    )
    return CallbackList([evaluation, CheckpointCallback(30, str(folder))]), evaluation, on_best


def test_callbacks_go_on(tmp_path: Path) -> None:
    def make() -> Any:
        return build(PPOClip, normalize=True)

    expected, evaluation, on_best = with_callbacks(tmp_path / "a")
    whole = make().learn(TOTAL, callback=[expected, Kill()])
    for at in (130, 260):
        killed(make, at, tmp_path / "c", with_callbacks(tmp_path / "b")[0])
    callbacks, other, other_best = with_callbacks(tmp_path / "b")
    require_same(resumed(make, tmp_path / "c", callbacks), whole)
    for name in ("n_calls", "num_timesteps", "best_mean_reward", "last_mean_reward", "evaluations_results"):
        assert getattr(other, name) == getattr(evaluation, name)
    assert len(other.evaluations_results) == TOTAL // 40
    assert vars(other_best)["no_improvement_evals"] == vars(on_best)["no_improvement_evals"]
    assert other.callback_on_new_best.n_calls == evaluation.callback_on_new_best.n_calls
    assert other.parent is not evaluation and other_best.parent is other
    names = [{path.name for path in (tmp_path / side).iterdir()} for side in "ab"]
    assert names[0] == names[1]
    for key, value in np.load(tmp_path / "a/evaluations.npz").items():
        assert np.array_equal(value, np.load(tmp_path / "b/evaluations.npz")[key])


def test_callbacks_of_the_user_keep_their_attributes(tmp_path: Path) -> None:
    counting = Counting()
    uninterrupted(lambda: build(TRPO), counting)
    with pytest.warns(UserWarning, match=r"`Counting._lock` is not in the checkpoints"):
        killed(lambda: build(TRPO), 200, tmp_path, Counting())
    other = Counting()
    with pytest.warns(UserWarning, match=r"`Counting._lock`"):
        resumed(lambda: build(TRPO), tmp_path, other)
    assert other.seen[2:] == counting.seen[2:] and len(other.seen) == 2 + TOTAL // 2


class Scheduled(RolloutBuffer):
    """A rollout buffer that counts."""

    rollouts = 0

    def reset(self) -> None:
        super().reset()
        self.rollouts += 1
        self.gae_lambda = 0.9 + 0.01 * min(self.rollouts, 9)


class CountingExtractor(FlattenExtractor):
    """Features that change with the number of times that it was switched to training."""

    calls = 0

    def train(self, mode: bool = True) -> Any:
        self.calls += mode
        return super().train(mode)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return super().forward(observations) * (1 + 1e-3 * self.calls)


def test_buffers_and_networks_of_the_user_keep_their_attributes(tmp_path: Path) -> None:
    def make() -> Any:
        policy = {"features_extractor_class": CountingExtractor}
        return build(PPOClip, rollout_buffer_class=Scheduled, policy_kwargs=policy)

    whole = uninterrupted(make)
    killed(make, 200, tmp_path)
    model = resumed(make, tmp_path)
    require_same(model, whole)
    assert model.rollout_buffer.rollouts == whole.rollout_buffer.rollouts
    assert model.policy.features_extractor.calls == whole.policy.features_extractor.calls > 5


def test_a_bar_of_progress_may_come_and_go(tmp_path: Path) -> None:
    def counted() -> Any:
        return CheckpointCallback(10_000, str(tmp_path / "models"))

    killed(lambda: build(TRPO), 200, tmp_path / "c", counted(), progress_bar=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The run had")
        callback = counted()
        resumed(lambda: build(TRPO), tmp_path / "c", callback)
    assert callback.n_calls == TOTAL // 2


def test_what_is_learnt_goes_on_in_another_number_of_processes(tmp_path: Path) -> None:
    """The parts of several ranks in one checkpoint."""
    killed(lambda: build(TRPO, "Pendulum-v1", normalize=True), 150, tmp_path)
    (folder,) = (path for path in tmp_path.iterdir() if path.name.endswith("128"))
    part = (folder / "rank-0.pkl").read_bytes()
    ranks = [checkpoint_files.CheckpointFolder(tmp_path, rank, 2) for rank in range(2)]
    said = checkpoint_files.read_manifest(folder / "manifest.json")
    entries = [each.write_part(128, part) for each in ranks]
    ranks[0].write_manifest(128, entries, {name: said[name] for name in said if name not in ("parts", "world_size")})
    assert [checkpoint_files.CheckpointFolder(tmp_path, rank, 3).newest().own for rank in range(3)] == [
        True,
        True,
        False,
    ]
    with pytest.warns(UserWarning, match="begin new episodes.*the run had 2 processes, and has 1"):
        model = resumed(lambda: build(TRPO, "Pendulum-v1", normalize=True), tmp_path)
    assert model.num_timesteps == TOTAL and model._n_updates == TOTAL // 64
    assert model.get_vec_normalize_env().obs_rms.count > TOTAL


def test_tensorboard_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def program(at: int, name: str) -> Any:
        model = TRPO("MlpPolicy", "CartPole-v1", n_steps=64, seed=0, device="cpu", tensorboard_log=str(tmp_path / name))
        model.learn(TOTAL, callback=Kill(at), checkpoint_dir=tmp_path / f"c{name}", checkpoint_freq=64)
        return model

    program(0, "whole")
    with pytest.raises(KilledError):
        program(200, "tb")
    TRPO("MlpPolicy", "CartPole-v1", n_steps=64, tensorboard_log=str(tmp_path / "tb"), device="cpu").learn(64)
    program(0, "tb")
    assert {path.name for path in (tmp_path / "tb").iterdir()} == {"TRPO_1", "TRPO_2"}  # the other run has its own
    curves = []
    for name in ("whole", "tb"):
        events = EventAccumulator(str(tmp_path / name / "TRPO_1")).Reload()
        curves.append({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]})
    steps = [step for step, _ in curves[1]["rollout/ep_rew_mean"]]
    assert steps == sorted(set(steps))
    for tag, values in curves[0].items():
        assert "time" in tag or curves[1][tag] == values


def test_a_monitors_file_goes_on(tmp_path: Path) -> None:
    def make(name: str) -> Any:
        env = DummyVecEnv([lambda: Monitor(gym.make("CartPole-v1"), str(tmp_path / name))])
        return TRPO("MlpPolicy", VecMonitor(env, str(tmp_path / f"{name}-vec")), n_steps=64, seed=0, device="cpu")

    uninterrupted(lambda: make("whole"))
    killed(lambda: make("part"), 200, tmp_path / "c")
    resumed(lambda: make("part"), tmp_path / "c")
    for kind in ("", "-vec"):
        columns = []
        for name in ("whole", "part"):
            lines = (tmp_path / f"{name}{kind}.monitor.csv").read_text().splitlines()[2:]
            columns.append([line.split(",")[:2] for line in lines])
        assert len(columns[0]) > 5 and columns[0] == columns[1]


# Environments


class Unknown(gym.Env):
    """A task whose state nobody knows."""

    observation_space, action_space = OBSERVATION_SPACES["vector"], ACTION_SPACES["discrete"]

    def __init__(self) -> None:
        self.state = iter(range(1_000_000))

    def reset(self, **kwargs: Any) -> Any:
        super().reset(seed=kwargs.get("seed"))
        return self.np_random.random(5).astype(np.float32), {}

    def step(self, action: Any) -> Any:
        return self.np_random.random(5).astype(np.float32), float(action), next(self.state) % 50 == 49, False, {}


def test_an_unknown_environment_begins_new_episodes_and_says_so(tmp_path: Path) -> None:
    def make(base: Any = DummyVecEnv) -> Any:
        env = VecNormalize(base([lambda: Monitor(Unknown(), allow_early_resets=False)] * 2))
        return TRPO("MlpPolicy", env, n_steps=STEPS, seed=0, device="cpu")

    killed(make, 150, tmp_path)
    (last,) = (path for path in tmp_path.iterdir() if path.name.endswith("128"))
    states: list[Any] = []

    class LookAtStart(BaseCallback):
        def _on_rollout_start(self) -> None:
            if not states:
                model = self.model
                states.extend([all_of(model), model._last_obs.copy(), model.get_vec_normalize_env()])
                assert model._last_episode_starts.all() and model.num_timesteps == int(last.name)
                assert not model.get_vec_normalize_env().returns.any()
                assert np.array_equal(model._last_obs, states[2].normalize_obs(states[2].get_original_obs()))

        def _on_step(self) -> bool:
            return True

    look = Look()
    make().learn(TOTAL, callback=[look, Kill()])
    with pytest.warns(UserWarning, match=r"begin new episodes.*Unknown is not known.*get_checkpoint_state") as warned:
        model = resumed(make, tmp_path, LookAtStart())
    assert len([each for each in warned if "new episodes" in str(each.message)]) == 1
    assert model.num_timesteps == TOTAL
    other = {"observation", "starts", "returns"}
    assert {name for name, value in look.found[128].items() if states[0][name] != value} <= other


class Own(Unknown):
    """The same with the two methods."""

    def get_checkpoint_state(self) -> Any:
        left = next(self.state)
        self.state = iter(range(left, 1_000_000))
        return left, self.np_random

    def set_checkpoint_state(self, state: Any) -> None:
        left, self._np_random = state
        self.state = iter(range(left, 1_000_000))


class Scaled(gym.Wrapper):
    """A wrapper of the user's that holds numbers."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.steps = 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        observation, reward, *rest = self.env.step(action)
        return observation, reward * (1 + 0.1 * self.steps), *rest


class Opaque(Scaled):
    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.handle = threading.Lock()


def test_two_methods_make_an_environment_exact(tmp_path: Path) -> None:
    def make() -> Any:
        env = DummyVecEnv([lambda: Monitor(Scaled(gym.wrappers.TimeLimit(Own(), 33)))] * 2)
        return TRPO("MlpPolicy", VecFrameStack(env, 3), n_steps=STEPS, seed=0, device="cpu")

    whole = all_of(uninterrupted(make))
    killed(make, 170, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all_of(resumed(make, tmp_path)) == whole
    assert "Opaque keeps `handle`, a lock" in why_not_exact(Opaque(Own()))
    assert [type(each).__name__ for each in layers(Scaled(Own()))] == ["Scaled", "Own"]


def test_environments_in_processes_of_their_own(tmp_path: Path) -> None:
    def make(task: Any) -> Any:
        env = VecNormalize(SubprocVecEnv([lambda: Monitor(task())] * 2, start_method="fork"))
        return TRPO("MlpPolicy", env, n_steps=STEPS, seed=0, device="cpu")

    for task in (lambda: gym.make("Hopper-v5"), lambda: gym.wrappers.TimeLimit(Own(), 33)):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        model = uninterrupted(lambda task=task: make(task))
        whole = all_of(model)
        model.env.close()
        model = killed(lambda task=task: make(task), 170, folder)
        model.env.close()
        model = resumed(lambda task=task: make(task), folder)
        assert all_of(model) == whole
        model.env.close()

    model = killed(lambda: make(Unknown), 170, tmp_path / "unknown")
    model.env.close()
    with pytest.warns(UserWarning, match="Unknown is not known"):
        model = resumed(lambda: make(Unknown), tmp_path / "unknown")
    assert model.env.has_attr("_sb3_trpo_ext_env_state") is False
    model.env.close()


# What is not a checkpoint of this run


def test_damaged_files(tmp_path: Path) -> None:
    for damage in ("truncated", "changed", "missing", "foreign", "manifest truncated", "manifest changed", "empty"):
        folder = tmp_path / damage
        killed(lambda: build(TRPO), 250, folder)
        before, last = sorted(path for path in folder.iterdir() if path.is_dir())
        harm(last, damage)
        expected = all_of(uninterrupted(lambda: build(TRPO)))
        with pytest.warns(UserWarning, match=rf"damaged.*{before.name}, is used.*{last.name}"):
            assert all_of(resumed(lambda: build(TRPO), folder)) == expected


def harm(folder: Path, how: str) -> None:
    part, manifest = folder / "rank-0.pkl", folder / "manifest.json"
    path = manifest if "manifest" in how else part
    data = bytearray(path.read_bytes())
    if "truncated" in how:
        path.write_bytes(data[: len(data) // 2])
    elif "changed" in how:
        index = data.index(b'"total": ') + 9 if path is manifest else len(data) // 2
        data[index] = data[index] ^ 1
        path.write_bytes(data)
    elif how == "missing":
        path.unlink()
    elif how == "foreign":
        path.write_bytes(pickle.dumps({"a": 1}))
    else:
        path.write_bytes(b"")


def test_nothing_whole_is_an_error_and_the_model_is_as_it_was(tmp_path: Path) -> None:
    killed(lambda: build(TRPO), 250, tmp_path)
    for folder in tmp_path.iterdir():
        harm(folder, "changed")
    model = build(TRPO)
    before = [param.detach().clone() for param in model.policy.parameters()]
    with pytest.raises(DamagedError, match=r"No checkpoint in .* is whole.*SHA-256.*empty `checkpoint_dir`"):
        model.learn(TOTAL, checkpoint_dir=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    assert model.num_timesteps == 0
    model.learn(64)  # and it can be trained


def test_a_state_that_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(lambda: build(TRPO), 250, tmp_path)
    model = build(TRPO)
    before = [param.detach().clone() for param in model.policy.parameters()]

    def fails(states: Any) -> None:
        raise RuntimeError("of another kind")

    monkeypatch.setattr(checkpoint, "_put_generators", fails)
    with pytest.raises(RuntimeError, match="of another kind"):
        model.learn(TOTAL, checkpoint_dir=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    assert model.num_timesteps == 0


OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "gamma": (lambda: build(TRPO, gamma=0.9), "gamma is 0.99 there and 0.9 here"),
    "n_steps": (lambda: build(TRPO, n_steps=64), "n_steps is 32 there and 64 here"),
    "schedule": (lambda: build(TRPO, target_kl=lambda p: 0.01 * p + 0.001), "target_kl is 0.01 there and a schedule"),
    "task": (
        lambda: build(TRPO, "CartPole-v0"),
        r"to 500 .*\(CartPole-v1\) there and .*to 200 steps.*\(CartPole-v0\)",
    ),
    "kwargs": (
        lambda: build(TRPO, lambda: gym.make("CartPole-v1", sutton_barto_reward=True)),
        r"\(CartPole-v1\) there and .*\(CartPole-v1, {'sutton_barto_reward': True}\) here",
    ),
    "algorithm": (lambda: build(NPG), "the algorithm is TRPO there and NPG here"),
    "spaces": (lambda: build(TRPO, "Acrobot-v1"), "the observation space is Box.* there and Box"),
    "wrappers": (
        lambda: build(TRPO, normalize=True),
        "wrappers of the environments is none there and VecNormalize here",
    ),
    "network": (
        lambda: build(TRPO, policy_kwargs={"net_arch": [8]}),
        r"policy_kwargs is \{\} there and \{net_arch: \(8\)\} here",
    ),
    "n_envs": (
        lambda: TRPO("MlpPolicy", make_vec_env("CartPole-v1", 3), n_steps=STEPS, device="cpu"),
        "n_envs is 2 there and 3 here",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused_by_what_differs(name: str, tmp_path: Path) -> None:
    killed(lambda: build(TRPO), 250, tmp_path)
    make, message = OTHERS[name]
    model = make()
    before = [param.detach().clone() for param in model.policy.parameters()]
    with pytest.raises(ValueError, match=rf"holds another run: .*{message}.*use an empty directory"):
        model.learn(TOTAL, checkpoint_dir=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    # What is not learnt may differ.
    resumed(lambda: build(TRPO, seed=4, verbose=0, stats_window_size=50), tmp_path)


def test_arguments_that_cannot_work(tmp_path: Path) -> None:
    model = build(TRPO)
    for freq in (0, -1, 1.5, True, "10"):
        with pytest.raises(ValueError, match=r"`checkpoint_freq` must be an integer of at least 1, got"):
            model.learn(64, checkpoint_dir=tmp_path, checkpoint_freq=freq)
    with pytest.raises(ValueError, match="got 10 without one"):
        model.learn(64, checkpoint_freq=10)
    with pytest.raises(TypeError, match="`checkpoint_dir` must be a path, got 3"):
        model.learn(64, checkpoint_dir=3)
    with pytest.raises(ValueError, match="got ''"):
        model.learn(64, checkpoint_dir="")
    with pytest.raises(ValueError, match="`total_timesteps` must be a number of timesteps, got nan"):
        model.learn(float("nan"), checkpoint_dir=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="`checkpoint_dir` must be a directory that can be written"):
        model.learn(64, checkpoint_dir=tmp_path / "file")
    assert model.num_timesteps == 0
    (tmp_path / "notes.txt").write_text("of the user")
    (tmp_path / "123").mkdir()
    (tmp_path / "123" / "of the user").touch()
    build(MaskableTRPO).learn(64, use_masking=True, checkpoint_dir=tmp_path)
    endless = build(TRPO).learn(math.inf, lambda *_: False, checkpoint_dir=tmp_path / "endless")
    assert endless.num_timesteps == 2
    assert (tmp_path / "notes.txt").exists() and (tmp_path / "123" / "of the user").exists()


def test_a_full_disk_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files.os, "fsync", full)
    with pytest.warns(UserWarning, match="No checkpoint could be written at 64 timesteps.*No space left"):
        model = resumed(lambda: build(TRPO), tmp_path)
    assert model.num_timesteps == TOTAL
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_could_not_be_completed_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith("manifest.json") and "0192" in str(target):
            raise OSError(28, "No space left on device")
        original(source, target)

    monkeypatch.setattr(checkpoint_files.os, "replace", full)
    with pytest.warns(UserWarning, match="No checkpoint could be written at 192 timesteps.*No space left"):
        build(TRPO).learn(192, checkpoint_dir=tmp_path, checkpoint_freq=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000064", "000000000128"]


def test_a_later_checkpoint_that_is_damaged_does_not_take_the_place_of_one(tmp_path: Path) -> None:
    build(TRPO).learn(320, checkpoint_dir=tmp_path, checkpoint_freq=1)
    later = tmp_path / "000000099999" / "manifest.json"
    later.parent.mkdir()
    later.write_text("{}")
    with pytest.warns(UserWarning, match="A checkpoint is damaged"):
        build(TRPO).learn(448, checkpoint_dir=tmp_path, checkpoint_freq=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000384", "000000000448", "000000099999"]


class Collecting(BaseCallback):
    """Fills a list of the script's."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__()
        self.seen = seen

    def _on_step(self) -> bool:
        self.seen.append(self.num_timesteps)
        return True


def test_a_list_that_a_script_gave_to_its_callback_is_filled(tmp_path: Path) -> None:
    for total in (128, 256):
        seen: list[int] = []
        build(TRPO).learn(total, Collecting(seen), checkpoint_dir=tmp_path, checkpoint_freq=1)
        assert seen == list(range(2, total + 1, 2))


class Moving(BaseCallback):
    """Changes into another directory."""

    def _on_rollout_start(self) -> None:
        os.chdir("/")

    def _on_step(self) -> bool:
        return True


def test_a_program_may_change_into_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build(TRPO).learn(128, Moving(), checkpoint_dir="run", checkpoint_freq=1)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["000000000064", "000000000128"]


def test_an_interrupt_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, left = os.fsync, iter(range(8))

    def interrupted(descriptor: int) -> None:
        original(descriptor)
        if next(left, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resumed(lambda: build(TRPO), tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.unfinished"))
    require_same(resumed(lambda: build(TRPO), tmp_path), uninterrupted(lambda: build(TRPO)))


def test_the_same_model_goes_on_too(tmp_path: Path) -> None:
    """In a notebook: the cell is run again, with the objects that the interrupted one has left."""
    model, counting = build(PPOPenalty, "Pendulum-v1", target_kl=1e-4), Kill(200)
    with pytest.raises(KilledError):
        model.learn(TOTAL, checkpoint_dir=tmp_path, checkpoint_freq=1, callback=counting)
    counting.at = 0
    model.learn(TOTAL, checkpoint_dir=tmp_path, checkpoint_freq=1, callback=counting)
    assert counting.n_calls == TOTAL // 2
    whole = build(PPOPenalty, "Pendulum-v1", target_kl=1e-4).learn(TOTAL, callback=Kill())
    require_same(model, whole)


def test_a_model_is_saved_and_copied_without_its_run(tmp_path: Path) -> None:
    class Save(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 40:
                self.model.save(tmp_path / "model")
                assert copy.deepcopy(self.model)._run is None
            return True

    build(TRPO).learn(TOTAL, checkpoint_dir=tmp_path / "c", callback=Save())
    assert TRPO.load(tmp_path / "model", device="cpu")._run is None
