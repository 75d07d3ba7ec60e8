"""Memory is bounded by the chunk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from envs import make, with_rollout
from torch import nn

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.policy import memory_budget as device
from sb3_trpo_ext.policy.memory_budget import affordable_samples
from sb3_trpo_ext.rollout.buffers import whole_rollout

PEAK = """
import sys
from pathlib import Path
import numpy as np, torch
from gymnasium import spaces
sys.path.insert(0, {tests!r})
from envs import RandomEnv
from sb3_trpo_ext import TRPO

torch.set_num_threads(1)
env = RandomEnv(spaces.Box(0, 255, (84, 84, 4), np.uint8), spaces.Discrete(6))
model = TRPO("CnnPolicy", env, n_steps={n_steps}, fisher_chunk_size=32, curvature_samples=32, device="cpu", seed=0)
update = model.train
model.train = lambda: None
model.learn({n_steps})
update()  # whatever is built once
Path("/proc/self/clear_refs").write_text("5")
memory = lambda key: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key))
before = memory("VmRSS")
update()
print((memory("VmHWM") - before) / 1024)
"""


def peaks_mib(*n_steps: int) -> list[float]:
    """Each in a process of its own, beside one another."""
    scripts = [PEAK.format(tests=str(Path(__file__).parents[1]), n_steps=steps) for steps in n_steps]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
        for script in scripts
    ]
    return [float(process.communicate()[0]) for process in processes]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's memory counters")
def test_the_peak_of_an_image_update_grows_with_the_chunk_and_not_with_the_batch() -> None:
    small, large = peaks_mib(64, 256)
    batch_growth = (256 - 64) * 84 * 84 * 4 * 4 / 2**20  # the images alone, as floats
    assert large - small < 0.2 * batch_growth, (small, large)


def test_what_a_sample_costs_is_what_autograd_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_rollout(make(TRPO))
    batch = whole_rollout(model.rollout_buffer, model.action_space)
    layers = nn.Sequential(nn.Linear(5, 100), nn.Tanh(), nn.Linear(100, 50), nn.Tanh(), nn.Linear(50, 3))
    monkeypatch.setattr(device, "MEMORY_BUDGET", 2**20)
    cost = 4 * (100 + 50)  # the two activations, once each; the input is a view of the rollout
    samples = affordable_samples(layers, lambda part: layers(part.inputs), batch)
    assert samples == 2**20 // (device.GRAPHS * cost)


def test_a_budget_too_small_for_one_sample_still_takes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "MEMORY_BUDGET", 1)
    model = with_rollout(make(TRPO, observation="image", n_steps=4))
    model.train()
    assert all(bool(param.isfinite().all()) for param in model.policy.parameters())


def test_auto_is_the_chunk_that_the_budget_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "MEMORY_BUDGET", 200_000)
    sizes: list[int | None] = []
    step = TRPO._policy_step
    monkeypatch.setattr(
        TRPO, "_policy_step", lambda self, problem: sizes.append(problem._chunk_size) or step(self, problem)
    )
    automatic = make(TRPO, "box", "image").learn(32).policy
    assert sizes[0] is not None
    assert 1 <= sizes[0] < 32
    by_hand = make(TRPO, "box", "image", fisher_chunk_size=sizes[0]).learn(32).policy
    for one, other in zip(automatic.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(one, other)
