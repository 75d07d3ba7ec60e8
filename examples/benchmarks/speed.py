"""Time training against sb3_contrib.TRPO and SB3's PPO: same environments, default settings of both, one thread.

    python examples/benchmarks/speed.py                      # all cases, then the table and the plot (about an hour)
    python examples/benchmarks/speed.py --cases Hopper-v5    # those whose name contains a word
    python examples/benchmarks/speed.py --report             # the table and the plot of what was measured

Every measurement is a fresh process: build, one iteration to warm up, then the timed iterations of ``learn``. Ours and
the peer's alternate, so that a slow spell of the machine meets both. The table shows the median of the paired ratios
peer/ours, and the smallest and the largest.

Phases: *rollout* is ``collect_rollouts``; *policy* is ``train`` up to the critic, *critic* the rest of it (for PPO all
of ``train`` is *policy*); *iteration* is the whole of ``learn``. *Environment bound* is ours: training steps a second
over the steps a second of the same vectorised environment stepped with actions drawn beforehand. *Memory* is the peak
of the process during the policy phase above what it held before.

The plot shows the policy phase, of time and of memory, against the batch and against the width of both hidden layers.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

RESULTS = Path(__file__).parent / "results" / "speed.json"
FIGURE = RESULTS.parent / "speed_scaling.png"
PHASES = ("iteration", "rollout", "policy", "critic")


@dataclass(frozen=True)
class Case:
    """What to time.

    Attributes:
        env: Gymnasium id, or a name in `ENVIRONMENTS`.
        n_envs: Environments.
        algorithm: Ours; the peer is the one of SB3 or sb3-contrib in `PEERS`.
        normalize: Wrap in VecNormalize.
        iterations: Timed iterations of a measurement.
        settings: Arguments beyond the defaults, of both.
        label: How it is called; empty for a name made of the rest.
    """

    env: str
    n_envs: int
    algorithm: str = "TRPO"
    normalize: bool = False
    iterations: int = 5
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def name(self) -> str:
        """How table and file call it."""
        if self.label:
            return self.label
        parts = [self.env, f"{self.n_envs} env" + "s" * (self.n_envs > 1)]
        if self.normalize:
            parts.append("VecNormalize")
        if self.algorithm != "TRPO":
            parts.insert(0, f"{self.algorithm} vs {PEERS[self.algorithm].split('.')[1]}")
        return ", ".join(parts)


PEERS = {
    "TRPO": "sb3_contrib.TRPO",
    "PPOClip": "stable_baselines3.PPO",
    "MaskableTRPO": "sb3_contrib.MaskablePPO",
    "RecurrentTRPO": "sb3_contrib.RecurrentPPO",
}

LSTM = {"n_steps": 128, "policy_kwargs": {"lstm_hidden_size": 64}}

CASES = [
    Case("CartPole-v1", 8),
    Case("CartPole-v1", 8, iterations=10, settings={"n_steps": 256}, label="CartPole-v1, 8 envs of 256 steps"),
    Case("Pendulum-v1", 1),
    Case("Hopper-v5", 1),
    Case("Hopper-v5", 8, iterations=3),
    Case("HalfCheetah-v5", 2),
    Case("HalfCheetah-v5", 2, normalize=True),
    Case("Ant-v5", 1),
    Case("random images", 8, iterations=1, settings={"n_steps": 1024}),
    Case("Hopper-v5", 1, algorithm="PPOClip"),
    Case("CartPole-v1", 8, algorithm="PPOClip"),
    Case("CartPole-v1 as a Dict", 8),
    Case("CartPole-v1 with masks", 8, algorithm="MaskableTRPO"),
    Case("Pendulum-v1", 8, algorithm="RecurrentTRPO", iterations=3, settings=LSTM),
]


def scaling_case(batch: int, width: int) -> Case:
    """One point of the plot; the critic, which is not in it, is cut short."""
    settings = {"n_steps": batch // 8, "n_critic_updates": 1, "policy_kwargs": {"net_arch": [width, width]}}
    return Case("random vectors", 8, iterations=2, settings=settings, label=f"batch {batch}, width {width}")


BATCHES = (1024, 4096, 16384, 65536)
WIDTHS = (64, 128, 256, 512, 1024)
SCALING = {
    "samples in the batch (width 64)": {batch: scaling_case(batch, 64) for batch in BATCHES},
    "width of both hidden layers (2048 samples)": {width: scaling_case(2048, width) for width in WIDTHS},
}


EVERY = CASES + [case for points in SCALING.values() for case in points.values()]


class RandomEnv(gym.Env[Any, Any]):
    """Noise to observe, drawn beforehand, and episodes of 256 steps: an environment that costs next to nothing."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.Space[Any]) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        observation_space.seed(0)
        self._observations = [observation_space.sample() for _ in range(16)]
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        return self._observations[0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step."""
        self._steps += 1
        return self._observations[self._steps % 16], float(np.sum(action)), self._steps % 256 == 0, False, {}


class AsDict(gym.ObservationWrapper[Any, Any, Any]):
    """Shows a vector as a Dict of two."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        space = env.observation_space
        assert isinstance(space, gym.spaces.Box)
        self._half = space.shape[0] // 2
        low, high = space.low, space.high
        self.observation_space = gym.spaces.Dict(
            {
                "first": gym.spaces.Box(low[: self._half], high[: self._half]),
                "second": gym.spaces.Box(low[self._half :], high[self._half :]),
            }
        )

    def observation(self, observation: Any) -> dict[str, Any]:
        """The two halves."""
        return {"first": observation[: self._half], "second": observation[self._half :]}


class Masked(gym.Wrapper[Any, Any, Any, Any]):
    """Allows every action, and says so."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        assert isinstance(env.action_space, gym.spaces.Discrete)
        self._all = np.ones(env.action_space.n, dtype=bool)

    def action_masks(self) -> Any:
        """One for each action."""
        return self._all


ENVIRONMENTS: dict[str, Callable[[], gym.Env[Any, Any]]] = {
    "random images": lambda: RandomEnv(gym.spaces.Box(0, 255, (84, 84, 4), np.uint8), gym.spaces.Discrete(6)),
    "random vectors": lambda: RandomEnv(gym.spaces.Box(-1, 1, (11,)), gym.spaces.Box(-1, 1, (3,))),
    "CartPole-v1 as a Dict": lambda: AsDict(gym.make("CartPole-v1")),
    "CartPole-v1 with masks": lambda: Masked(gym.make("CartPole-v1")),
}
POLICIES = {"random images": "CnnPolicy", "CartPole-v1 as a Dict": "MultiInputPolicy"}


def make_env(case: Case) -> Any:
    """The vectorised environment of a case."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    env = make_vec_env(ENVIRONMENTS.get(case.env, case.env), n_envs=case.n_envs, seed=0)
    return VecNormalize(env) if case.normalize else env


class PhaseClock:
    """Seconds and bytes of each phase of a model's iterations."""

    def __init__(self, model: Any) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.peak_mib = 0.0
        self._model = model
        self._critic_start = 0.0
        model.collect_rollouts = self._timed_rollout(model.collect_rollouts)
        model.train = self._timed_train(model.train)

    def _timed_rollout(self, collect: Callable[..., bool]) -> Callable[..., bool]:
        def timed(*args: Any, **kwargs: Any) -> bool:
            start = time.perf_counter()
            result = collect(*args, **kwargs)
            self.seconds["rollout"] += time.perf_counter() - start
            return result

        return timed

    def _timed_train(self, train: Callable[[], None]) -> Callable[[], None]:
        def timed() -> None:
            self._mark_the_critic()
            start, self._critic_start = time.perf_counter(), 0.0
            before = reset_peak_memory()
            train()
            end = time.perf_counter()
            critic_start = self._critic_start or end
            self.seconds["policy"] += critic_start - start
            self.seconds["critic"] += end - critic_start
            if not self._critic_start:
                self._note_memory()
            self.peak_mib = max(self.peak_mib, self._peak - before)

        return timed

    def _mark_the_critic(self) -> None:
        """Note where the critic begins: ours fits one, contrib's asks the buffer for its first minibatch."""
        model = self._model
        if hasattr(model, "value_critic"):
            owner, name, begins = model.value_critic, "fit", lambda *args: True
        elif hasattr(model, "n_critic_updates"):
            owner, name, begins = model.rollout_buffer, "get", lambda *args: args == (model.batch_size,)
        else:
            return
        method = getattr(type(owner), name).__get__(owner)

        def marked(*args: Any, **kwargs: Any) -> Any:
            if begins(*args) and not self._critic_start:
                self._note_memory()
                self._critic_start = time.perf_counter()
            return method(*args, **kwargs)

        setattr(owner, name, marked)

    def _note_memory(self) -> None:
        self._peak = memory_mib("VmHWM")


def memory_mib(key: str) -> float:
    """A line of /proc/self/status, in MiB; NaN where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def reset_peak_memory() -> float:
    """Forget the peak of the process; returns what it holds now, in MiB."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    return memory_mib("VmRSS")


def measure(case: Case, arm: str, device: str) -> dict[str, float]:
    """One measurement, in this process: seconds an iteration, steps a second of the bare environment, peak memory."""
    import torch

    torch.set_num_threads(1)
    package, name = ("sb3_trpo_ext", case.algorithm) if arm == "ours" else PEERS[case.algorithm].split(".")
    algorithm = getattr(import_module(package), name)
    env = make_env(case)
    policy = "MlpLstmPolicy" if case.algorithm == "RecurrentTRPO" else POLICIES.get(case.env, "MlpPolicy")
    model = algorithm(policy, env, seed=0, device=device, **case.settings)
    steps = model.n_steps * case.n_envs
    clock = PhaseClock(model)
    if case.iterations > 1:
        model.learn(steps)
        clock.seconds = dict.fromkeys(PHASES, 0.0)
    start = time.perf_counter()
    model.learn(case.iterations * steps, reset_num_timesteps=False)
    clock.seconds["iteration"] = time.perf_counter() - start
    result = {phase: seconds / case.iterations for phase, seconds in clock.seconds.items()}

    env.reset()
    actions = [np.array([env.action_space.sample() for _ in range(case.n_envs)]) for _ in range(model.n_steps)]
    start = time.perf_counter()
    for action in actions:
        env.step(action)
    bare = time.perf_counter() - start
    return result | {"environment_bound": bare / result["iteration"], "policy_mib": clock.peak_mib}


def run_all(cases: list[Case], repetitions: int, device: str) -> None:
    """Measure both arms of every case in turn, and keep the file current."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}
    results["versions"] = {
        name: version(name) for name in ("sb3-trpo-ext", "stable-baselines3", "sb3-contrib", "torch", "numpy")
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for case in cases:
        pairs = []
        for repetition in range(repetitions):
            pair = {}
            for arm in ("ours", "peer") if repetition % 2 == 0 else ("peer", "ours"):
                command = [sys.executable, __file__, "--measure", case.name, arm, "--device", device]
                finished = subprocess.run(
                    command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
                )
                pair[arm] = json.loads(finished.stdout.splitlines()[-1])
            pairs.append(pair)
            print(f"{case.name}: {repetition + 1} of {repetitions}", file=sys.stderr, flush=True)
        results["cases"][key_of(case, device)] = pairs
        partial = RESULTS.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n")
        partial.replace(RESULTS)


def key_of(case: Case, device: str) -> str:
    """How the results file calls a case."""
    return case.name if device == "cpu" else f"{case.name}, {device}"


def spread(values: list[float]) -> str:
    """The median with the smallest and the largest; empty if there is nothing to compare."""
    if not np.isfinite(values).all():
        return ""
    return f"**{np.median(values):.2f}** ({min(values):.2f} to {max(values):.2f})"


def report() -> None:
    """Print the Markdown table of what was measured."""
    results = json.loads(RESULTS.read_text())
    rows = [case.name for case in CASES]
    print("| case | whole iteration | rollout | policy step | critic | environment bound | policy memory, ours/peer |")
    print("|---" * 7 + "|")
    for name, pairs in results["cases"].items():
        if not name.startswith(tuple(rows)):
            continue
        cells = [
            spread([pair["peer"][phase] / pair["ours"][phase] if pair["ours"][phase] else np.nan for pair in pairs])
            for phase in PHASES
        ]
        cells.append(spread([pair["ours"]["environment_bound"] for pair in pairs]))
        memory = [pair["ours"]["policy_mib"] / max(pair["peer"]["policy_mib"], 1e-9) for pair in pairs]
        big = np.median([pair["peer"]["policy_mib"] for pair in pairs]) > 100
        print(f"| {name} | " + " | ".join([*cells, spread(memory) if big else ""]) + " |")


def plot(figure_path: Path) -> None:
    """Draw time and memory of the policy phase against batch and width, as far as they were measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measured = json.loads(RESULTS.read_text())["cases"]
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex="col", layout="constrained")
    panels = {"policy": (1000, "policy step, ms"), "policy_mib": (1, "its peak memory, MiB")}
    for column, (title, points) in enumerate(SCALING.items()):
        sizes = [size for size, case in points.items() if case.name in measured]
        for row, (key, (factor, name)) in enumerate(panels.items()):
            panel = axes[row, column]
            for arm, label, colour in (("ours", "sb3_trpo_ext.TRPO", "C0"), ("peer", "sb3_contrib.TRPO", "C1")):
                values = [[factor * pair[arm][key] for pair in measured[points[size].name]] for size in sizes]
                panel.plot(sizes, [np.median(each) for each in values], "o-", color=colour, label=label)
                panel.fill_between(sizes, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.2)
            panel.set(xscale="log", yscale="log", xticks=sizes, xticklabels=[f"{size:,}" for size in sizes])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(name)
        axes[1, column].set_xlabel(title)
    axes[0, 0].legend(frameon=False)
    figure.savefig(figure_path, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="*", default=[""], metavar="WORD", help="only cases whose name has one of these"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="measurements of each arm")
    parser.add_argument("--device", default="cpu", help="device of the models")
    parser.add_argument(
        "--figure", type=Path, default=RESULTS.parent / "speed_scaling.png", help="where to draw the plot"
    )
    parser.add_argument("--report", action="store_true", help="only print the table")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "ARM"), help="one measurement (used internally)")
    args = parser.parse_args()
    if args.measure:
        case = next(case for case in EVERY if case.name == args.measure[0])
        print(json.dumps(measure(case, args.measure[1], args.device)))
        return
    if not args.report:
        run_all(
            [case for case in EVERY if any(word in case.name for word in args.cases)], args.repetitions, args.device
        )
    report()
    plot(args.figure)


if __name__ == "__main__":
    main()
