"""Tables and figures of what `learning.py` left in ``results/learning.csv.gz``, from that table alone.

    python examples/benchmarks/report.py                        # tables, and figures beside the results
    python examples/benchmarks/report.py --variants 100 101 102 # all that was run on these seeds, to choose a default
    python examples/benchmarks/report.py --table tuning --variants 100 101 --tasks Hopper-v5 HalfCheetah-v5

Definitions (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264, computed by rliable):

- *final return*: mean of the 20 returns of each of the last three evaluations;
- *normalised score*: (return - random) / (best - random), *random* the measured return of uniformly drawn actions and
  *best* the highest published mean return of several seeds, of whatever on-policy method and version (`PUBLISHED`);
- *IQM*: mean of the middle half of the normalised final returns over tasks and seeds;
- intervals: 95 %, 2000 resamples of the seeds within each task (stratified bootstrap, percentiles);
- *probability of improvement*: P(X > Y) for one run of either, averaged over tasks; a tie counts half;
- *wall-clock*: CPU seconds of training with one thread, without evaluations. Curves over it show the last evaluation
  finished by then.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from jobs import RESULTS, current
from learning import (
    ARMS,
    MAIN_STEPS,
    MUJOCO,
    RANDOM,
    STEP_SIZES,
    STUDIES,
    TABLE,
    TWO_TASKS,
    step_size_arm,
)
from rliable import library, metrics

RESAMPLES = 2000
COLOURS = dict(zip(ARMS, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
MAIN_ARMS = ("TRPO", "sb3_contrib TRPO", "PPO")
PUBLISHED = {
    "Hopper-v5": (3372, "sb3-contrib's TRPO"),
    "Walker2d-v5": (4502, "sb3-contrib's TRPO"),
    "HalfCheetah-v5": (5784, "tianshou's PPO"),
    "InvertedDoublePendulum-v5": (9351, "tianshou's A2C"),
    "Reacher-v5": (-4.1, "tianshou's PPO"),
    "Swimmer-v5": (359, "sb3-contrib's TRPO"),
    "Ant-v5": (3554, "sb3-contrib's TRPO"),
}
"""Returns after 1M steps on earlier versions of the tasks: the best in sb3-contrib's documentation of TRPO (3 seeds,
``-v3``) and tianshou's MuJoCo benchmark (10 seeds, ``-v3`` and ``-v2``, the best of each run)."""


@dataclass(frozen=True)
class Run:
    """The evaluations of one run.

    Attributes:
        steps: Timesteps, ``(K,)``.
        seconds: CPU seconds of training until then, ``(K,)``.
        returns: Mean return of the 20 episodes, ``(K,)``.
    """

    steps: np.ndarray
    seconds: np.ndarray
    returns: np.ndarray

    @property
    def final(self) -> float:
        """The final return."""
        return float(self.returns[-3:].mean())

    def at(self, seconds: np.ndarray) -> np.ndarray:
        """The return by a time: of the last evaluation finished then, of the first before there is one."""
        return self.returns[np.clip(np.searchsorted(self.seconds, seconds, side="right") - 1, 0, None)]


@cache
def run_of(arm: str, task: str, seed: int, table: str) -> Run | None:
    """A finished run; None for one that is missing."""
    found = current(table)["evaluations"]
    if (arm, task, seed) not in found.index:
        return None
    evaluations = json.loads(found[arm, task, seed])
    steps, seconds = np.array(evaluations["timesteps"]), np.array(evaluations["cpu_seconds"])
    return Run(steps, seconds, np.mean(evaluations["returns"], axis=1))


def runs_of(arm: str, task: str, seeds: Iterable[int], table: str = TABLE) -> list[Run]:
    """The finished runs of an arm on a task."""
    return [run for seed in seeds if (run := run_of(arm, task, seed, table)) is not None]


def bootstrap(samples: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A statistic of ``(runs, tasks, ...)`` scores, and its interval ``(2, ...)``."""
    np.random.seed(0)  # rliable draws from the global generator, whatever `random_state` it is given
    points, intervals = library.get_interval_estimates({"": samples}, statistic, reps=RESAMPLES)
    return points[""], intervals[""]


def interval_of(task: str, samples: Sequence[float]) -> str:
    """Mean return with its bootstrap interval."""
    digits = 1 if task.startswith("Reacher") else 0
    if len(samples) < 2:
        return "-" if not samples else f"{samples[0]:.{digits}f}"
    mean, (low, high) = bootstrap(np.array(samples)[:, None], lambda x: np.array([x.mean()]))
    return f"{mean[0]:.{digits}f} [{low[0]:.{digits}f}, {high[0]:.{digits}f}]"


def random_return(task: str) -> float:
    """What uniformly drawn actions return."""
    return float(current(TABLE)["score"][RANDOM, task, 0])


def normalised(task: str, returns: np.ndarray) -> np.ndarray:
    """Scores of returns: 0 for random actions, 1 for the best published."""
    low, high = random_return(task), PUBLISHED[task][0]
    return (returns - low) / (high - low)


def curves(
    arm: str, tasks: Sequence[str], seeds: Iterable[int], values: Callable[[str, Run], np.ndarray]
) -> np.ndarray:
    """Values of all runs, ``(runs, tasks, ...)``, as many runs as every task has."""
    per_task = [[values(task, run) for run in runs_of(arm, task, seeds)] for task in tasks]
    complete = min(map(len, per_task))
    return np.array([values[:complete] for values in per_task]).swapaxes(0, 1)


def iqm(scores: np.ndarray) -> np.ndarray:
    """IQM of ``(runs, tasks)``, or of each of the K columns of ``(runs, tasks, K)``."""
    columns = scores.reshape(*scores.shape[:2], -1)
    return np.array([metrics.aggregate_iqm(columns[..., k]) for k in range(columns.shape[-1])])


def final_scores(arm: str, seeds: Iterable[int], tasks: Sequence[str] = MUJOCO) -> np.ndarray:
    """Normalised final returns ``(runs, tasks)``."""
    return curves(arm, tasks, seeds, lambda task, run: normalised(task, np.array(run.final)))


def interval_of_iqm(scores: np.ndarray) -> str:
    """The IQM of ``(runs, tasks)`` scores with its bootstrap interval."""
    value, (low, high) = bootstrap(scores, iqm)
    return f"{value[0]:.2f} [{low[0]:.2f}, {high[0]:.2f}]"


def table_of_returns(arms: Sequence[str], tasks: Sequence[str], seeds: Iterable[int]) -> None:
    """Print the final returns."""
    print("| task (steps) | " + " | ".join(arms) + " |")
    print("|---" * (len(arms) + 1) + "|")
    for task in tasks:
        cells = []
        for arm in arms:
            finals = [run.final for run in runs_of(arm, task, seeds)]
            cells.append(f"{interval_of(task, finals)} (n={len(finals)})")
        print(f"| {task} ({MAIN_STEPS[task] // 1000}k) | " + " | ".join(cells) + " |")


def table_of_long_runs() -> None:
    """Print the final returns after a million steps: mean and each seed, beside the best published; and their IQM."""
    study = STUDIES["long"]
    print("| task (1M) | " + " | ".join(arm.rpartition(" ")[0] for arm in study.arms) + " | published |")
    print("|---" * (len(study.arms) + 2) + "|")
    for task in study.tasks:
        cells = []
        for arm in study.arms:
            finals = [run.final for run in runs_of(arm, task, range(study.seeds))]
            each = ", ".join(f"{final:.0f}" for final in finals)
            cells.append(f"{np.mean(finals):.0f} ({each})" if finals else "-")
        print(f"| {task} | {' | '.join(cells)} | {PUBLISHED[task][0]} ({PUBLISHED[task][1]}) |")
    scores = [final_scores(arm, range(study.seeds), study.tasks) for arm in study.arms]
    print(f"| IQM | {' | '.join(interval_of_iqm(of_arm) if of_arm.size else '-' for of_arm in scores)} | 1 |")


def time_of(task: str, seeds: Iterable[int]) -> float:
    """The median of the CPU seconds that TRPO takes for a task."""
    return float(np.median([run.seconds[-1] for run in runs_of("TRPO", task, seeds)]))


def table_of_aggregates(arms: Sequence[str], seeds: Iterable[int]) -> None:
    """Print IQM at equal steps and at equal wall-clock, and the probability that TRPO is better."""
    ours = final_scores("TRPO", seeds)
    print("| MuJoCo tasks | IQM, equal steps | IQM, equal wall-clock | P(TRPO better) | CPU seconds / TRPO's |")
    print("|---|---|---|---|---|")
    for arm in arms:
        scores = final_scores(arm, seeds)
        early = curves(
            arm, MUJOCO, seeds, lambda task, run: normalised(task, run.at(np.array([time_of(task, seeds)]))[0])
        )
        cells = [interval_of_iqm(samples) for samples in (scores, early)]
        better = metrics.probability_of_improvement(ours, scores) if arm != "TRPO" else np.nan
        slower = np.mean(
            [
                np.median([run.seconds[-1] for run in runs_of(arm, task, seeds)]) / time_of(task, seeds)
                for task in MUJOCO
            ]
        )
        print(f"| {arm} | {' | '.join(cells)} | {'-' if np.isnan(better) else f'{better:.2f}'} | {slower:.1f} |")


def draw_band(
    axes: plt.Axes, x: np.ndarray, samples: np.ndarray, statistic: Callable[..., np.ndarray], arm: str
) -> None:
    """A curve with its interval."""
    middle, (low, high) = bootstrap(samples, statistic)
    axes.plot(x, middle, label=arm, color=COLOURS[arm])
    axes.fill_between(x, low, high, alpha=0.2, color=COLOURS[arm], linewidth=0)


def draw_curves(arms: Sequence[str], tasks: Sequence[str], seeds: Iterable[int], path: Path) -> None:
    """A grid of learning curves: mean return over seeds against environment steps."""
    columns = 4
    figure, grid = plt.subplots(
        -(-len(tasks) // columns),
        columns,
        figsize=(3.6 * columns, 2.8 * -(-len(tasks) // columns)),
        layout="constrained",
    )
    for axes, task in zip(grid.flat, tasks, strict=False):
        for arm in arms:
            samples = curves(arm, [task], seeds, lambda _, run: run.returns)
            if task in ARMS[arm].tasks and len(samples) > 1:
                steps = runs_of(arm, task, seeds)[0].steps
                draw_band(axes, steps / 1000, samples, lambda x: x.mean(axis=(0, 1)), arm)
        axes.set(title=task, xlabel="1000 steps", ylabel="return")
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(tasks) :]:
        axes.axis("off")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(path, dpi=110)


def draw_aggregates(arms: Sequence[str], seeds: Iterable[int], path: Path) -> None:
    """IQM against steps and against wall-clock, and the performance profile, over the MuJoCo tasks."""
    figure, (by_steps, by_time, profile) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    fractions = np.linspace(0.04, 2.0, 50)
    thresholds = np.linspace(0.0, 1.2, 61)
    for arm in arms:
        samples = curves(arm, MUJOCO, seeds, lambda task, run: normalised(task, run.returns))
        draw_band(by_steps, runs_of(arm, MUJOCO[0], seeds)[0].steps / 1000, samples, iqm, arm)
        samples = curves(
            arm, MUJOCO, seeds, lambda task, run: normalised(task, run.at(fractions * time_of(task, seeds)))
        )
        draw_band(by_time, fractions, samples, iqm, arm)
        scores = final_scores(arm, seeds)
        draw_band(profile, thresholds, scores, lambda x: np.array([(x > t).mean() for t in thresholds]), arm)
    by_steps.set(xlabel="1000 steps", ylabel="IQM of the normalised return", title="by environment steps")
    by_time.set(xlabel="CPU time, in units of TRPO's for the task", title="by wall-clock (TRPO ends at 1)")
    profile.set(xlabel="normalised final return τ", ylabel="fraction of runs above τ", title="performance profile")
    for axes in (by_steps, by_time, profile):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def draw_step_sizes(path: Path) -> None:
    """Return against step size: the mean over seeds, and each seed."""
    study = STUDIES["step-sizes"]
    (task,) = study.tasks
    figure, grid = plt.subplots(
        1, len(STEP_SIZES), figsize=(5 * len(STEP_SIZES), 3.6), sharey=True, layout="constrained"
    )
    for axes, (arm, (name, values)) in zip(grid, STEP_SIZES.items(), strict=True):
        finals = {
            value: [run.final for run in runs_of(step_size_arm(arm, value), task, range(study.seeds))]
            for value in values
        }
        means = {value: np.mean(of_seeds) for value, of_seeds in finals.items() if of_seeds}
        axes.plot(list(means), list(means.values()), color=COLOURS[arm], marker="o")
        for value, of_seeds in finals.items():
            axes.plot([value] * len(of_seeds), of_seeds, ".", color=COLOURS[arm], alpha=0.5)
        axes.axhline(random_return(task), color="grey", linestyle=":")
        axes.set(title=arm, xlabel=name, ylabel="return", xscale="log", xlim=(min(values) / 2, 2 * max(values)))
        axes.grid(alpha=0.3)
    figure.suptitle(f"{task}, 200k steps: mean of {study.seeds} seeds and each of them; dotted: random actions")
    figure.savefig(path, dpi=110)


def table_of_variants(table: str, seeds: Sequence[int], tasks: Sequence[str]) -> None:
    """Print every variant that was run on some of the seeds and tasks (none: all): the final returns."""
    found = [
        (arm, task)
        for arm, task, seed in current(table).index
        if arm != RANDOM and seed in seeds and (not tasks or task in tasks)
    ]
    tasks = sorted({task for _, task in found})
    print("| variant | " + " | ".join(tasks) + " |")
    print("|---" * (len(tasks) + 1) + "|")
    for arm in sorted({arm for arm, _ in found}):
        cells = []
        for task in tasks:
            finals = [run.final for run in runs_of(arm, task, seeds, table)]
            cells.append(f"{interval_of(task, finals)} (n={len(finals)})" if finals else "-")
        print(f"| {arm} | " + " | ".join(cells) + " |")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(5)), help="seeds that are reported")
    parser.add_argument("--variants", nargs="+", type=int, metavar="SEED", help="report all variants on these seeds")
    parser.add_argument("--table", default=TABLE, help="table of the variants (default: %(default)s)")
    parser.add_argument("--tasks", nargs="*", default=[], metavar="TASK", help="tasks of the variants (default: all)")
    parser.add_argument("--figures", type=Path, default=RESULTS, help="folder for the figures (default: %(default)s)")
    args = parser.parse_args()
    if args.variants:
        table_of_variants(args.table, args.variants, args.tasks)
        return
    table_of_returns(MAIN_ARMS, tuple(MAIN_STEPS), args.seeds)
    print()
    table_of_aggregates(MAIN_ARMS, args.seeds)
    print()
    table_of_returns(tuple(ARMS), TWO_TASKS, args.seeds)
    print()
    table_of_long_runs()
    draw_curves(tuple(ARMS), tuple(MAIN_STEPS), args.seeds, args.figures / "learning_curves.png")
    draw_aggregates(MAIN_ARMS, args.seeds, args.figures / "learning_aggregates.png")
    draw_step_sizes(args.figures / "step_sizes.png")


if __name__ == "__main__":
    main()
