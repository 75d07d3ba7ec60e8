"""The learning benchmarks' jobs: what they are known by, and tables that survive whatever is killed."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from textwrap import dedent
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import jobs  # noqa: E402

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
SETTINGS = st.dictionaries(st.text(), VALUES, max_size=4)
GAPS = st.lists(st.sampled_from(["", ",", "],["]), min_size=5, max_size=5)
UNLIKE_JSON: list[dict[Any, Any]] = [
    {"clip": {1: 2}},
    {"net_arch": (64, 64)},
    {"tasks": {"Hopper"}},
    {"gamma": float("nan")},
    {"schedule": object()},
]


def id_of(settings: dict[str, Any], arm: str = "TRPO", task: str = "Hopper-v5", seed: int = 0) -> str:
    return jobs.Job(arm, task, seed, settings).id


def same(a: Any, b: Any) -> bool:
    """Whether two contents are one, types included: 1, 1.0 and True are three."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(each) for each in value] if isinstance(value, list) else value


@given(SETTINGS, SETTINGS)
def test_different_settings_have_different_ids_and_equal_ones_the_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert (id_of(a) == id_of(b)) == same(a, b)
    assert id_of(a) == id_of(deepcopy(a))


@given(st.text("123456789", min_size=1, max_size=6), GAPS, GAPS)
def test_no_comma_or_bracket_of_the_settings_is_lost(digits: str, gaps: list[str], other_gaps: list[str]) -> None:
    def networks(between: list[str]) -> Any:
        first, *others = digits
        return json.loads("[[" + first + "".join(map("".join, zip(between, others, strict=False))) + "]]")

    a, b = networks(gaps), networks(other_gaps)
    assert (id_of({"net_arch": a}) == id_of({"net_arch": b})) == same(a, b)


def test_the_two_networks_that_were_one_job_are_two() -> None:
    assert id_of({"net_arch": [64, 64]}) != id_of({"net_arch": [6, 464]})


@given(SETTINGS)
def test_the_order_of_settings_does_not_matter(settings: dict[str, Any]) -> None:
    assert id_of(reordered(settings)) == id_of(settings)


@given(st.text(), st.text(), st.integers(), st.text(), st.text(), st.integers())
def test_arm_task_and_seed_are_told_apart(arm: str, task: str, seed: int, arm_2: str, task_2: str, seed_2: int) -> None:
    one, other = (arm, task, seed), (arm_2, task_2, seed_2)
    assert (id_of({}, *one) == id_of({}, *other)) == (one == other)
    assert (id_of({}, arm, task) == id_of({}, task, arm)) == (arm == task)


@pytest.mark.parametrize("settings", UNLIKE_JSON, ids=lambda settings: str(next(iter(settings), "")))
def test_settings_that_json_would_write_like_others_are_refused(settings: dict[Any, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        id_of(settings)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    jobs.current.cache_clear()
    return tmp_path


def parts(results: Path) -> list[Path]:
    return list((results / ".parts").rglob("*.json"))


def test_rows_come_back_to_the_last_digit_however_often_the_table_is_written(results: Path) -> None:
    scores = [1 / 3, 1e-300, -0.1 - 0.2, 295.13220525]
    evaluations = {"timesteps": [10, 20], "cpu_seconds": [0.1, 0.2], "returns": [[1.23], [4.56]]}
    for seed, score in enumerate(scores):
        job = jobs.Job("TRPO net_arch=[64,64]", "a task, with a comma", seed, {"net_arch": [64, 64], "s": '"\n'})
        jobs.write_row("study", job, score, evaluations=evaluations, cpu_seconds=score, algorithm=Path)
        assert len(parts(results)) == 1
        assert len(jobs.rows("study")) == seed + 1
        assert not parts(results)
    found = jobs.rows("study")
    assert list(found) == jobs.COLUMNS
    assert list(found["score"]) == list(found["cpu_seconds"]) == scores
    assert json.loads(found["settings"][0]) == job.settings and json.loads(found["evaluations"][0]) == evaluations
    assert set(json.loads(found["versions"][0])) == set(jobs.PACKAGES)
    assert jobs.scores("study", job.arm, job.task, range(9)) == scores


def test_whoever_dies_between_the_steps_of_a_merge_loses_and_doubles_nothing(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(3):
        jobs.write_row("study", jobs.Job("arm", "task", seed, {}), seed)

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    for step in ("replace", "unlink"):
        with monkeypatch.context() as dying, pytest.raises(Killed):
            dying.setattr(Path, step, killed)
            jobs.rows("study")
        assert len(parts(results)) == 3
    assert (results / "study.csv.gz").exists()
    assert sorted(jobs.rows("study")["seed"]) == [0, 1, 2] and not parts(results)


def test_a_row_that_is_not_moved_yet_counts_as_done_and_a_torn_one_does_not(results: Path) -> None:
    done, torn, new = (jobs.Job("arm", "task", seed, {}) for seed in range(3))
    jobs.write_row("study", done, 1.0)
    (results / ".parts" / "study" / f"{torn.id}.partial").write_text('{"id": "')
    script = results / "job.py"
    script.write_text("import sys; print(*sys.argv[1:], file=open(sys.argv[0] + '.log', 'a'))")
    assert jobs.run_missing("study", [str(script), "--table", "study"], [done, torn, new], workers=1) == 0
    launched = Path(f"{script}.log").read_text().splitlines()
    assert launched == [f"--table study --job arm task {seed}" for seed in (1, 2)]


def test_of_an_arm_on_a_task_only_the_latest_settings_count(results: Path) -> None:
    for settings, seeds in (({"n_steps": 1}, (0, 1, 2)), ({"n_steps": 2}, (0, 1))):
        for seed in seeds:
            jobs.write_row("study", jobs.Job("arm", "task", seed, settings), settings["n_steps"])
            jobs.rows("study")
    jobs.write_row("study", jobs.Job("arm", "other task", 0, {}), 7.0)
    assert len(jobs.rows("study")) == 6
    assert jobs.scores("study", "arm", "task", range(3)) == [2, 2]
    assert jobs.scores("study", "arm", "other task", range(3)) == [7]


def test_processes_that_move_rows_at_once_lose_none(tmp_path: Path) -> None:
    code = dedent("""
        import sys, jobs
        for seed in range(8):
            jobs.write_row("study", jobs.Job(sys.argv[1], "task", seed, {}), 1.0)
            jobs.rows("study")
    """)
    env = {**os.environ, "BENCHMARK_RESULTS": str(tmp_path), "PYTHONPATH": str(BENCHMARKS)}
    running = [subprocess.Popen([sys.executable, "-c", code, arm], env=env) for arm in "ab"]
    assert [process.wait() for process in running] == [0, 0]
    found = pd.read_csv(tmp_path / "study.csv.gz")
    assert sorted(zip(found["arm"], found["seed"], strict=True)) == [(arm, seed) for arm in "ab" for seed in range(8)]


@pytest.mark.parametrize("table", ["learning", "critics", "family", "tuning", "tuning_falling_radius"])
def test_the_rows_of_the_repository_are_known_by_what_they_say(table: str) -> None:
    found = jobs.read(BENCHMARKS / "results" / f"{table}.csv.gz")
    ids = [jobs.Job(row.arm, row.task, row.seed, json.loads(row.settings)).id for row in found.itertuples(index=False)]
    assert ids == list(found["id"]) and len(set(ids)) == len(ids)


def test_results_are_few_small_files_with_plain_names() -> None:
    files = [path for path in (BENCHMARKS / "results").iterdir() if path.name != ".parts"]
    assert 0 < len(files) <= 15
    assert all(path.is_file() and path.name.replace(".", "").replace("_", "").isalnum() for path in files)
    assert sum(path.stat().st_size for path in files) < 2.5e6


def test_a_table_that_is_not_there_is_empty(results: Path) -> None:
    assert jobs.rows("study").empty and jobs.scores("study", "arm", "task", range(3)) == []
    assert not list(results.iterdir())
