import json
import math
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pandas as pd
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*arguments: str, **variables: str) -> str:
    """Run an example in a process of its own and return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, text=True, env=environment
    ).stdout


def test_the_training_script_trains_saves_and_draws(tmp_path: Path) -> None:
    printed = run(str(EXAMPLES / "train.py"), "--timesteps", "2048", "--output", str(tmp_path))
    assert "Before training: mean return" in printed
    assert "After training:  mean return" in printed
    picture = Path(printed.split("Learning curve:")[1].strip())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (picture.parent / "model.zip").exists()


def test_an_environment_of_ones_own_is_learnt() -> None:
    printed = run(str(EXAMPLES / "custom_env.py"), "--timesteps", "20000")
    before, after = (float(line.split("mean return")[1].split("±")[0]) for line in printed.splitlines())
    assert before < -20 < -8 < after


@pytest.mark.parametrize(
    ("timesteps", "reached"),
    [(8192, -math.inf), pytest.param(80_000, -700, marks=pytest.mark.slow)],  # a random policy: -1200
)
def test_a_distribution_of_ones_own_is_learnt(timesteps: int, reached: float) -> None:
    printed = run("-W", "error", str(EXAMPLES / "beta_policy.py"), "--timesteps", str(timesteps))
    assert reached < float(printed.split("mean return")[1].split("±")[0]) <= 0


def test_callbacks_see_evaluations_checkpoints_and_updates(tmp_path: Path) -> None:
    printed = run(str(EXAMPLES / "callbacks.py"), "--timesteps", "10240", "--output", str(tmp_path))
    assert "Best evaluation: mean return" in printed
    assert "Checkpoints: 5 in" in printed
    divergence, updates = printed.split("KL divergence: at most ")[1].split(" updates")[0].split(" in ")
    assert 0 < float(divergence) <= 0.01
    assert updates == "4"  # the fifth has no rollout after it


def test_the_script_of_sb3_contrib_runs_unchanged() -> None:
    printed = run(str(EXAMPLES / "from_sb3_contrib.py"), "--timesteps", "4096").splitlines()
    assert [line.split()[0] for line in printed] == ["sb3_contrib", "sb3_trpo_ext", "A"]
    assert "at 4096 steps went on to 8192 here" in printed[2]


@pytest.mark.slow  # the programs themselves: tests/zoo/test_programs.py
def test_the_zoo_trains_enjoys_records_and_plots(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(EXAMPLES / "zoo_cartpole.sh"), str(tmp_path), "4096"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert "Mean reward:" in printed and "|CartPole-v1 |" in printed
    assert list(tmp_path.glob("trpo/CartPole-v1_1/videos/*.mp4"))


def test_short_examples_are_short() -> None:
    for name in ("zoo_cartpole.sh", "custom_env.py", "callbacks.py", "from_sb3_contrib.py", "beta_policy.py"):
        assert len((EXAMPLES / name).read_text().splitlines()) <= 60


def test_the_readme_example_names_what_exists() -> None:
    readme = (EXAMPLES.parent / "README.md").read_text()
    code = readme.split("```python")[1].split("```")[0]
    small = code.replace("Hopper-v5", "Pendulum-v1").replace("150_000", "2048").replace('"trpo_hopper"', "os.devnull")
    run("-c", "import os\n" + small.replace("model.save(os.devnull)", ""))


def test_the_critic_comparison_reports() -> None:
    assert "| default |" in run(str(EXAMPLES / "benchmarks" / "critics.py"), "--report")


def test_the_comparison_of_the_family_reports() -> None:
    assert "| RecurrentTRPO |" in run(str(EXAMPLES / "benchmarks" / "family.py"), "--report")


@pytest.mark.parametrize("script", ["critics", "family"])
def test_a_job_of_the_comparisons_leaves_its_row(script: str, tmp_path: Path) -> None:
    code = f"""
        import dataclasses, sys, {script} as script
        arm, task = sys.argv[2], sys.argv[3]
        if hasattr(script, "TASKS"):
            script.TASKS[task] = dataclasses.replace(script.TASKS[task], steps=256)
        else:
            script.TIMESTEPS[task] = 4096
        script.main()
    """
    arm, task = {"critics": ("adam", "CartPole-v1"), "family": ("RecurrentTRPO", "CartPole without velocities")}[script]
    variables = {"BENCHMARK_RESULTS": str(tmp_path), "PYTHONPATH": str(EXAMPLES / "benchmarks")}
    run("-c", dedent(code), "--job", arm, task, "3", **variables)
    (part,) = tmp_path.rglob("*.json")
    row = json.loads(part.read_text())
    assert (row["arm"], row["task"], row["seed"]) == (arm, task, 3)
    assert row["score"] > 5 and row["cpu_seconds"] > 0 and "TRPO" in row["algorithm"]
    assert json.loads(row["settings"])["n_timesteps"] == {"critics": 4096, "family": 256}[script]


def test_the_learning_benchmark_runs_what_is_missing_and_reports(tmp_path: Path) -> None:
    script = str(EXAMPLES / "benchmarks" / "learning.py")
    variant = "TRPO n_timesteps=2000 n_steps=64"
    jobs = ("--arms", variant, "--tasks", "CartPole-v1", "--seeds", "0", "1", "--workers", "1", "--table", "tiny")
    results = {"BENCHMARK_RESULTS": str(tmp_path)}
    assert "0/3" in run(script, *jobs, "--budget-minutes", "0", **results)
    assert "3/3" in run(script, *jobs, **results)
    assert "0/0" in run(script, *jobs, **results)  # nothing is run twice

    table = pd.read_csv(tmp_path / "tiny.csv.gz")
    assert list(table["arm"]) == ["random", variant, variant] and list(table["seed"]) == [0, 0, 1]
    random, first, _ = table.itertuples()
    assert random.score < 40
    evaluations = json.loads(first.evaluations)
    assert evaluations["timesteps"] == [1840, 1920, 2000]
    assert 0 < evaluations["cpu_seconds"][0] <= evaluations["cpu_seconds"][2] == first.cpu_seconds
    assert np.shape(evaluations["returns"]) == (3, 20)
    assert np.mean(evaluations["returns"][2]) == pytest.approx(first.score)
    settings = json.loads(first.settings)
    assert settings["n_steps"] == 64 and settings["n_timesteps"] == 2000
    assert first.algorithm.startswith("sb3_trpo_ext.") and first.algorithm.endswith(".TRPO")
    name = "'TRPO n_timesteps=2000 n_steps=64'"
    assert first.command == f"python examples/benchmarks/learning.py --table tiny --job {name} CartPole-v1 0"

    report = (str(EXAMPLES / "benchmarks" / "report.py"), "--table", "tiny", "--variants", "0", "1")
    printed = run(*report, **results)
    assert f"| {variant} | " in printed and "(n=2)" in printed
    assert "CartPole-v1" not in run(*report, "--tasks", "Acrobot-v1", **results)


def test_the_report_on_learning_makes_tables_and_figures(tmp_path: Path) -> None:
    few = "import sys, report; report.RESAMPLES = 50; sys.argv[1:] = ['--figures', sys.argv[1]]; report.main()"
    printed = run("-c", few, str(tmp_path), PYTHONPATH=str(EXAMPLES / "benchmarks"))
    assert "| Hopper-v5 (300k) |" in printed and "| TRPO | 0." in printed
    for name in ("learning_curves.png", "learning_aggregates.png", "step_sizes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_report_on_learning_resamples_alike_every_time() -> None:
    code = """
        import numpy as np, report
        first, second = (report.bootstrap(np.arange(9.0)[:, None], lambda x: x.mean(0))[1] for _ in range(2))
        assert (first == second).all()
    """
    run("-c", dedent(code), PYTHONPATH=str(EXAMPLES / "benchmarks"))


def test_the_speed_benchmark_measures_and_reports(tmp_path: Path) -> None:
    script = str(EXAMPLES / "benchmarks" / "speed.py")
    for arm in ("ours", "peer"):
        measured = json.loads(run(script, "--measure", "batch 1024, width 64", arm).splitlines()[-1])
        assert all(measured[phase] > 0 for phase in ("iteration", "rollout", "policy", "critic", "environment_bound"))
        assert sum(measured[phase] for phase in ("rollout", "policy", "critic")) <= measured["iteration"]
        assert 0 < measured["products"] < measured["policy"] + measured["critic"]
    printed = run(script, "--report", "--figure", str(tmp_path / "scaling.png"))
    assert "| whole iteration | fastest other library |" in printed
    assert "| share of the machine's arithmetic |" in printed
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_the_benchmark_on_fresh_rollouts_reports() -> None:
    printed = run(str(EXAMPLES / "benchmarks" / "fresh_rollouts.py"), "--report")
    assert "| solver | steps taken |" in printed
    assert "| critic | error in-sample |" in printed


def test_the_gain_of_steps_is_measured() -> None:
    code = """
        import numpy as np, torch, step_gain
        from argparse import Namespace

        # The jackknife against the spread over repetitions, where the truth is known.
        rng, found = np.random.default_rng(0), []
        truth, present = rng.normal(size=20), (1, step_gain.DECAYS[0])
        for _ in range(100):
            steps = truth + 2 * rng.normal(size=(24, 20))
            half = 0.5 * steps + rng.normal(size=(24, 20))
            references = truth + 3 * rng.normal(size=(24, 20))
            found.append(step_gain.relative_gains(references, {present: steps, "half": half})["half"])
        values, errors = np.array(found).T
        assert abs(values.mean() - 0.5) < 0.03 and 0.8 < errors.mean() / values.std() < 1.25

        # The estimator that the model has itself is what the model has.
        step_gain.FURTHER, step_gain.ROLLOUTS, step_gain.DECAYS = 2, (1, 2), (0.95, 0.7)
        step_gain.SETTINGS |= {"curvature_samples": None, "n_steps": 256}
        models, learn = [], step_gain.Followed.learn

        def noted(self, *args, **kwargs):
            models.append(self)
            learn(self, *args, **kwargs)
            if len(models) == 1:
                follower, own = self.estimators[1, 0.95].theta, step_gain.flatten(self.value_parameters)
                assert float((follower - own).norm() / own.norm()) < 1e-3
                assert float((self.estimators[2, 0.7].theta - own).norm() / own.norm()) > 1e-2
                assert [len(each.past) for each in self.estimators.values()] == [0, 0, 1, 1]

        step_gain.Followed.learn = noted
        args = Namespace(timesteps=3072, rollouts=3, critic_kwargs={}, own_targets=True)
        references, steps = step_gain.measure("Pendulum-v1", 0, args)
        assert len(references) == 3 and len(steps) == 6 and all(len(each) == 3 for each in steps.values())
        gains = step_gain.relative_gains(references, steps)
        assert gains[1, 0.95] == (1.0, 0.0) and all(np.isfinite(each).all() for each in gains.values())
    """
    run("-c", dedent(code), PYTHONPATH=str(EXAMPLES / "benchmarks"))
