"""Every mean, sum, maximum and count over samples is taken by a `Reduction`, and nowhere else."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sb3_trpo_ext
from sb3_trpo_ext.core.reduction import ALONE, merged_moments, moments_here

ROOT = Path(sb3_trpo_ext.__file__).parent
REDUCING = {"mean", "std", "var", "max", "min", "median", "amax", "amin", "sum", "mse_loss", "average"}
UPDATE = [path for path in sorted(ROOT.rglob("*.py")) if path.parent.name != "zoo" and path.name != "reduction.py"]

ALLOWED = {
    "torch.exp(self.policy.log_std).mean()": "over action dimensions",
    "kl.sum()": "a sum whose derivative is taken, row by row",
    "values.sum()": "whether derivatives are finite, of this process's own samples",
    "log_prob.sum()": "the same",
    "sample.values(policy).sum()": "which parameters it reaches",
    "x.max()": "whether there is a number that large",
    "x.min()": "whether there is one that small",
    "c.sum()": "a share of a gradient, whose total is taken",
    "log_std.sum()": "over the dimensions of an action",
    "log_std.detach().min()": "the same",
    "(torch.expm1(y) - y).sum()": "the same",
    "shift.abs().max()": "the same",
    "(shift * torch.expm1(-2.0 * scale * shift)).sum()": "the same",
    "(0 * values).nan_to_num().sum()": "zero",
    "self.weights.sum()": "of a subset that all workers have whole",
    "(self.weights > 0).sum()": "a share, whose total is taken",
    "(image * metric(image)).sum()": "over the samples of the curvature, which all workers have whole",
    "torch.stack(losses).sum()": "over chunks, a share whose total is taken",
    "torch.stack(squares).sum()": "the same",
    "torch.stack(shares).sum()": "the same",
    "PolicyOutput.of(self.policy, batch[:1]).z.sum()": "to see what it reaches",
    "np.diff(ends, prepend=-1).max()": "a length, whose largest is taken",
    "self._lengths.max()": "over sequences, for padding",
    "lengths.max()": "the same",
    "np.mean(values)": "over minibatches, each a number already",
    "np.max([share.kl_max for share in shares])": "over chunks, each a number already",
}


def reductions(path: Path) -> list[str]:
    """The calls in a file that make one number of a whole tensor."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in REDUCING:
            module = isinstance(node.func.value, ast.Name) and node.func.value.id in ("torch", "np", "F")
            axes = {keyword.arg for keyword in node.keywords} & {"dim", "axis"}
            if not axes and (module or not node.args):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", UPDATE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_reduces_samples_itself(path: Path) -> None:
    two_tensors = ("torch.min(", "torch.max(")  # elementwise
    for call in reductions(path):
        known = call in ALLOWED or (call.startswith(two_tensors) and "," in call)
        assert known, f"{path.name}: {call}: take it by the batch's reduction"


def test_what_is_allowed_is_there() -> None:
    there = {call for path in UPDATE for call in reductions(path)}
    assert set(ALLOWED) <= there


numbers = st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=50)


@given(numbers)
def test_alone_a_share_is_the_whole(values: list[float]) -> None:
    tensor = torch.tensor(values)
    assert float(ALONE.mean(tensor)) == float(tensor.mean())
    assert torch.equal(ALONE.standardized(tensor), (tensor - tensor.mean()) / (tensor.std() + 1e-8))
    weights = torch.rand(len(values))
    torch.testing.assert_close(ALONE.mean(tensor, weights), (weights * tensor).sum())
    assert float(ALONE.largest(tensor)) == np.max(np.float32(values))
    assert float(ALONE.smallest(tensor)) == np.min(np.float32(values))
    assert ALONE.any(tensor) == bool(np.any(values))
    assert ALONE.total(tensor) is tensor and ALONE.gather(tensor) is tensor and ALONE.count(7) == 7


def test_nothing_hides_a_nan() -> None:
    tensor = torch.tensor([0.0, float("nan"), 1.0])
    assert ALONE.largest(tensor).isnan() and ALONE.smallest(tensor).isnan() and ALONE.any(tensor)


@given(st.lists(numbers, min_size=1, max_size=5))
def test_moments_of_parts_are_those_of_the_whole(parts: list[list[float]]) -> None:
    whole = torch.tensor([value for part in parts for value in part], dtype=torch.float64)
    told = torch.stack([moments_here(torch.tensor(part)[None]) for part in parts])
    mean, variance = merged_moments(told)
    scale = float(whole.abs().max()) + 1.0
    assert float(mean) == pytest.approx(float(whole.mean()), abs=1e-12 * scale)
    assert float(variance) == pytest.approx(float(whole.var()), rel=1e-9, abs=1e-12 * scale**2)


def test_samples_of_weight_zero_do_not_count() -> None:
    values, weights = torch.tensor([1.0, 5.0, 9.0]), torch.tensor([0.5, 0.0, 0.5])
    told = torch.stack([moments_here(values[None], weights), moments_here(values[None], torch.zeros(3))])
    mean, variance = merged_moments(told)
    assert float(mean) == 5.0 and float(variance) == 32.0
