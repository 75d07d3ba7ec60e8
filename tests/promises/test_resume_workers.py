"""A killed run of several workers goes on: with the same ones bit for bit, with others from what it had learnt."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SCRIPT = """
import hashlib, json, os, pathlib, sys, warnings
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from sb3_trpo_ext import TRPO, PPOClip, RecurrentTRPO

(pathlib.Path(__file__).parent / f"pid-{os.getpid()}").touch()
torch.set_num_threads(1)
name, steps, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
kind, arguments = {
    "TRPO": (TRPO, {"momentum": 0.5, "sample_reuse": 2}),
    "RecurrentTRPO": (RecurrentTRPO, {}),
    "PPOClip": (PPOClip, {"batch_size": 48}),
}[name]
env = VecNormalize(make_vec_env("Pendulum-v1", 2))
policy = "MlpLstmPolicy" if kind is RecurrentTRPO else "MlpPolicy"
model = kind(policy, env, n_steps=32, seed=3, device="cpu", **arguments)
keep = {} if folder == "-" else {"checkpoint_dir": folder, "checkpoint_freq": 192}
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    model.learn(steps, **keep)
numbers = [*model.policy.parameters(), torch.tensor(env.obs_rms.mean), torch.get_rng_state()]
mark = hashlib.sha256(b"".join(each.detach().numpy().tobytes() for each in numbers[:-1])).hexdigest()[:12]
restarts = any("begin new episodes" in str(each.message) for each in told)
said = json.dumps([model.num_timesteps, mark, restarts, len(model.ep_info_buffer)])
os.write(1, f"\\nDONE {said}\\n".encode())  # at once, beside what the others write
"""


ELASTIC = """
import pathlib, signal, sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
import sb3_trpo_ext.recurrent  # here, and not in each worker
import stable_baselines3.common.env_util

script, workers, restarts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
program = compile(pathlib.Path(script).read_text(), script, "exec")

def work(arguments):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which is the launcher's own otherwise
    sys.argv = [script, *arguments]
    exec(program, {"__name__": "__main__", "__file__": script})

config = LaunchConfig(
    min_nodes=1, max_nodes=1, nproc_per_node=workers, max_restarts=restarts, monitor_interval=0.05,
    rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork",
)
elastic_launch(config, work)(sys.argv[4:])
"""
"""What torchrun does, but for workers that are forked: they have imported what takes seconds to import."""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def launch(script: Path, *arguments: str, workers: int, restarts: int = 0) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    torchrun += [f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    command = [sys.executable, *(torchrun if workers > 1 else []), str(script), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def launch_forked(script: Path, *arguments: str, workers: int, restarts: int = 0) -> subprocess.Popen[str]:
    launcher = script.parent / "elastic.py"
    launcher.write_text(ELASTIC)
    command = [sys.executable, str(launcher), str(script), str(workers), str(restarts), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> list[str]:
    """What the workers said at their end."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return re.findall(r"^DONE (.*)$", out, flags=re.M)


def workers_of(script: Path) -> list[int]:
    """The processes that have begun to run it."""
    return [int(each.name.removeprefix("pid-")) for each in script.parent.glob("pid-*")]


def is_running(process: int) -> bool:
    """Whether it is there, and more than what its parent has not asked for yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def wait_for_checkpoint(folder: Path, number: int = 1) -> None:
    end = time.monotonic() + 120
    while len(list(folder.glob("*/manifest.json"))) < number:
        assert time.monotonic() < end, "no checkpoint was written"
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["TRPO", "RecurrentTRPO", "PPOClip"])
def test_a_killed_worker_changes_nothing(kind: str, script: Path, tmp_path: Path) -> None:
    folder, steps = tmp_path / "run", "1920"
    start = launch if kind == "TRPO" else launch_forked
    killed = start(script, kind, steps, str(folder), workers=3, restarts=3)
    wait_for_checkpoint(folder)
    os.kill(workers_of(script)[1], signal.SIGKILL)
    found = finished(killed)
    (whole,) = {*finished(launch_forked(script, kind, steps, "-", workers=3))}
    assert found == [whole] * 3


def test_one_worker_is_a_process_without_torchrun(script: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    half = launch_forked(script, "TRPO", "640", folder, workers=1)
    whole = [start(script, "TRPO", "1280", "-", workers=1) for start in (launch, launch_forked)]
    finished(half)
    resumed = launch(script, "TRPO", "1280", folder, workers=1)  # the other one's checkpoint
    told = [finished(run) for run in (*whole, resumed)]
    assert told == [told[0]] * 3 and len(told[0]) == 1


@pytest.mark.slow
def test_twenty_kills_at_random_moments(script: Path, tmp_path: Path) -> None:
    folder, steps, kills = tmp_path / "run", "15360", 20
    whole = launch_forked(script, "TRPO", steps, "-", workers=3)
    while len(workers_of(script)) < 3 and whole.poll() is None:
        time.sleep(0.01)
    start = time.monotonic()
    (expected,) = {*finished(whole)}
    seconds, moments, done = time.monotonic() - start, random.Random(16), 0
    before = {*workers_of(script)}
    killed = launch_forked(script, "TRPO", steps, str(folder), workers=3, restarts=kills)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(finished, killed)
        while done < kills and not found.done():
            running = sorted({*workers_of(script)} - before)
            if len(running) < 3:
                time.sleep(0.005)
                continue
            time.sleep(moments.uniform(0.0, seconds / 12))
            victim = moments.choice(running)
            if is_running(victim):
                os.kill(victim, signal.SIGKILL)
                done += 1
            before |= {*running}
        assert found.result() == [expected] * 3
    assert done == kills


def test_another_number_of_workers_goes_on_with_what_was_learnt(script: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finished(launch(script, "TRPO", "960", str(folder), workers=3))
    for workers, steps in ((2, 1920), (3, 3520)):
        told = finished(launch(script, "TRPO", str(steps), str(folder), workers=workers))
        assert len(told) == workers and len({*told}) == 1
        timesteps, _, restarts, _ = json.loads(told[0])
        assert timesteps >= steps and restarts


def test_workers_do_not_outlive_torchrun(script: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launcher = launch(script, "TRPO", "100000000", str(folder), workers=2)
    wait_for_checkpoint(folder)
    workers = workers_of(script)
    launcher.kill()
    launcher.wait()
    end = time.monotonic() + 30
    while any(map(is_running, workers)):
        assert time.monotonic() < end, "workers go on without torchrun"
        time.sleep(0.1)


def test_sigterm_leaves_a_checkpoint_of_all(script: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launcher = launch(script, "TRPO", "100000000", str(folder), workers=2)
    wait_for_checkpoint(folder)
    for each in workers_of(script):
        os.kill(each, signal.SIGTERM)
    out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, err[-3000:]
    assert out.count("SIGTERM") == 1
    newest = max(folder.glob("*/manifest.json"))
    assert {each.name for each in newest.parent.iterdir()} == {"manifest.json", "rank-0.pkl", "rank-1.pkl"}
