"""An update happens wholly or not at all, whatever goes wrong inside."""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from envs import make, with_rollout

import sb3_trpo_ext
from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, PPOClip, PPOPenalty, RecurrentPPOClip, RecurrentTRPO
from sb3_trpo_ext.core.curvature import GaussNewtonProduct
from sb3_trpo_ext.policy import problem as policy_problem
from sb3_trpo_ext.policy.problem import PolicyProblem

PACKAGE = str(Path(sb3_trpo_ext.__file__).parent)
SMALL = {"n_steps": 8, "policy_kwargs": {"net_arch": [4]}}
ARMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gauss-newton": (
        TRPO,
        {**SMALL, "cg_max_steps": 3, "critic": "gauss_newton", "critic_kwargs": {"cg_steps": 2, "n_steps": 2}},
    ),
    "rejected": (
        TRPO,
        {
            **SMALL,
            "critic": "gauss_newton",
            "cg_max_steps": 3,
            "line_search_accept_ratio": 0.999,
            "line_search_max_iter": 2,
        },
    ),
    "adam": (TRPO, {**SMALL, "cg_max_steps": 2, "critic": "adam", "batch_size": 4, "n_critic_updates": 2}),
    "ppo": (PPOClip, {**SMALL, "batch_size": 4, "n_epochs": 2, "max_kl": 1.0}),
    "ppo-rolled-back": (PPOClip, {**SMALL, "batch_size": 4, "n_epochs": 2, "max_kl": 1e-9}),
    "max": (TRPO, {**SMALL, "cg_max_steps": 3, "trust_region": "max"}),
    "critic-of-two": (TRPO, {**SMALL, "cg_max_steps": 2, "critic_kwargs": {"cg_steps": 2, "n_rollouts": 2}}),
    "npg": (NPG, {**SMALL, "cg_max_steps": 3}),
    "ppo-penalty": (PPOPenalty, {**SMALL, "batch_size": 4, "n_epochs": 2, "target_kl": 1e-9}),
    "recurrent": (RecurrentTRPO, {**SMALL, "cg_max_steps": 2}),
    "recurrent-ppo": (RecurrentPPOClip, {**SMALL, "batch_size": 4, "n_epochs": 2}),
    "maskable": (MaskableTRPO, {**SMALL, "cg_max_steps": 2, "action": "multidiscrete"}),
}


def state(model: Any) -> list[Any]:
    """Everything an update may change, as comparable copies."""

    def flat(value: Any) -> Iterator[Any]:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                yield from (str(key), *flat(value[key]))
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from flat(item)
        else:
            yield value.numpy().tobytes() if isinstance(value, torch.Tensor) else value

    everything = {"policy": model.policy.state_dict(), "optimizer": model.policy.optimizer.state_dict()}
    everything["gradients"] = [param.grad for param in model.policy.parameters()]
    everything["past"] = [each.rewards.tobytes() for each in getattr(model, "_past_rollouts", ())]
    everything["left"] = getattr(model, "_theta_left", None)
    return list(flat(everything | {"beta": getattr(model, "kl_coef", None)}))


def prepared(arm: str, **changes: Any) -> Any:
    """A model with a full buffer and one update behind it, so that the optimiser has a state."""
    algorithm, options = ARMS[arm]
    model = make(algorithm, **{"action": "box", **options, **changes})
    model.learn(8)
    return with_rollout(model)


def train(model: Any, interrupt_at: int = -1, *, files: str = PACKAGE) -> int:
    """Train, with one KeyboardInterrupt before the n-th line run in ``files`` (-1: none); returns the lines run."""
    seen = 0

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal seen
        if event == "line":
            seen += 1
            if seen - 1 == interrupt_at:
                raise KeyboardInterrupt
        return local

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(files) else None

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        model.train()
    finally:
        sys.settrace(previous)
    return seen


def restore(model: Any, saved: dict[str, Any]) -> None:
    model.policy.load_state_dict(saved["policy"])
    model.policy.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # it may keep the tensors it is given
    for param, grad in zip(model.policy.parameters(), saved["gradients"], strict=True):
        param.grad = None if grad is None else grad.clone()
    vars(model).update(saved["remembered"])
    np.random.seed(0)
    if isinstance(model, PPOPenalty):
        model.kl_coef = saved["beta"]


def spread(lines: int) -> list[int]:
    """Every line event of a short update; of a long one about 200, and the last 60, where it is finished or undone."""
    return sorted({*range(0, lines, max(1, lines // 200)), *range(max(0, lines - 60), lines)})


def saved_state(model: Any) -> dict[str, Any]:
    """A copy to `restore`, which is restored right away, as loading an optimiser state may reorder it."""
    saved = copy.deepcopy({"policy": model.policy.state_dict(), "optimizer": model.policy.optimizer.state_dict()})
    saved["beta"] = getattr(model, "kl_coef", None)
    saved["remembered"] = {name: vars(model)[name] for name in ("_past_rollouts", "_theta_left") if name in vars(model)}
    saved["gradients"] = [None if param.grad is None else param.grad.clone() for param in model.policy.parameters()]
    restore(model, saved)
    return saved


@pytest.mark.parametrize("arm", ARMS)
def test_ctrl_c_between_any_two_lines(arm: str) -> None:
    model = prepared(arm)
    saved = saved_state(model)
    before = state(model)
    model._last_stand_in = None  # with networks for batches of other sizes, that only the first updates had
    train(model)  # once before the lines are counted, for what is looked up once and kept
    restore(model, saved)
    lines = train(model)
    after = state(model)

    outcomes = set()
    for line in spread(lines):
        restore(model, saved)
        with pytest.raises(KeyboardInterrupt):
            train(model, line)
        now = state(model)
        assert now in (before, after), f"half an update after an interrupt at line event {line} of {lines}"
        assert torch.is_grad_enabled()
        outcomes.add(now == before)
    assert True in outcomes
    restore(model, saved)
    model.train()
    assert state(model) == after


@pytest.mark.parametrize("arm", ["gauss-newton", "adam", "ppo", "ppo-penalty"])
def test_ctrl_c_while_a_finished_update_is_undone(arm: str) -> None:
    model = prepared(arm)
    model.rollout_buffer.returns[0] = 1e30  # its square overflows: the update is rejected once parameters have moved
    saved = saved_state(model)
    before = state(model)
    train(model)  # the first rejection of a kind is also reported
    restore(model, saved)
    lines = train(model)
    assert state(model) == before
    for line in spread(lines):
        restore(model, saved)
        with pytest.raises(KeyboardInterrupt):
            train(model, line)
        assert state(model) == before, f"half an update after an interrupt at line event {line} of {lines}"


@pytest.mark.parametrize("arm", ["gauss-newton", "adam", "ppo"])
def test_nothing_moves_any_more_once_an_interrupt_is_caught(arm: str) -> None:
    model = prepared(arm)
    saved = saved_state(model)
    for line in spread(train(model, files=contextlib.__file__)):
        restore(model, saved)
        try:
            train(model, line, files=contextlib.__file__)
        except KeyboardInterrupt:
            caught = state(model)  # a notebook holds the traceback, and all that it refers to, until the next error
        assert state(model) == caught, f"changed when the traceback was released, line event {line}"


@pytest.mark.parametrize("method", ["get_distribution", "predict_values", "evaluate_actions"])
@pytest.mark.parametrize("arm", ["gauss-newton", "adam", "npg", "ppo", "ppo-penalty", "recurrent", "maskable"])
def test_an_exception_inside_the_policy(arm: str, method: str) -> None:
    model = prepared(arm)
    before, original = state(model), getattr(model.policy, method)
    failures = 0
    for call in range(60):
        calls = [0]

        def failing(*args: Any, limit: int = call, count: list[int] = calls, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] > limit:
                raise RuntimeError("broken layer")
            return original(*args, **kwargs)

        setattr(model.policy, method, failing)
        try:
            model.train()
        except RuntimeError:
            failures += 1
            assert state(model) == before
        else:
            break
    first_order = "ppo" in arm
    expected = {"get_distribution": True, "predict_values": not first_order, "evaluate_actions": first_order}
    assert bool(failures) == expected[method]


def poisoned(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: change(original(*args, **kwargs)))


NAN = float("nan")


@pytest.mark.parametrize(
    ("owner", "name", "change", "words"),
    [
        (policy_problem, "gradient", lambda g: {p: v * NAN for p, v in g.items()}, "gradient of the surrogate"),
        (policy_problem, "gradient", lambda g: {p: v * 0 for p, v in g.items()}, "zero right-hand side"),
        (GaussNewtonProduct, "__call__", lambda product: product * NAN, "non-finite curvature"),
        (GaussNewtonProduct, "__call__", lambda product: -product, "non-positive curvature"),
    ],
    ids=["nan-gradient", "zero-gradient", "nan-curvature", "negative-curvature"],
)
def test_a_useless_direction_is_rejected_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], owner: Any, name: str, change: Any, words: str
) -> None:
    model = prepared("adam", verbose=1)
    model.n_critic_updates = 1
    before = {name: param.clone() for name, param in model.policy.named_parameters() if "value" not in name}
    poisoned(monkeypatch, owner, name, change)
    for _ in range(2):
        model.train()
    now = dict(model.policy.named_parameters())
    assert all(torch.equal(now[name], param) for name, param in before.items())
    assert capsys.readouterr().out.count(words) == 1
    assert model.logger.name_to_value["train/is_line_search_success"] == 0


@pytest.mark.parametrize("field", ["objective", "divergence"])
def test_a_trial_that_is_not_a_number_is_rejected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    model = prepared("gauss-newton", verbose=1)
    before = {name: param.clone() for name, param in model.policy.named_parameters() if "value" not in name}
    poisoned(monkeypatch, PolicyProblem, "evaluate", lambda e: replace(e, **{field: NAN}) if e.divergence else e)
    model.train()
    now = dict(model.policy.named_parameters())
    assert all(torch.equal(now[name], param) for name, param in before.items())
    assert "trial point is not finite" in capsys.readouterr().out


def test_ten_rejections_in_a_row_warn_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared("gauss-newton")
    poisoned(monkeypatch, GaussNewtonProduct, "__call__", lambda product: -product)
    for _ in range(9):
        model.train()
    with pytest.warns(UserWarning, match=r"10 updates in a row.*non-positive curvature.*target_kl"):
        model.train()


@pytest.mark.parametrize("arm", ["gauss-newton", "adam", "npg", "ppo", "ppo-penalty", "recurrent", "maskable"])
def test_returns_beyond_the_range_of_floats_take_nothing_with_them(
    arm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = prepared(arm, verbose=1)
    model.rollout_buffer.returns[:] = 1e30
    before, updates = state(model), model._n_updates
    model.train()
    assert state(model) == before
    assert model._n_updates == updates
    assert "is not finite" in capsys.readouterr().out
