"""One flat vector takes the optimiser's own steps."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sb3_trpo_ext.core.flat_optimizer import FlatDescent, FlatOptimizer, can_descend, is_awaited

SHAPES = [(7, 5), (5,), (1, 3), (1,), (33,)]
OPTIMIZERS: dict[str, Any] = {
    "adam": lambda params: torch.optim.Adam(params, lr=1e-2, eps=1e-5),
    "amsgrad": lambda params: torch.optim.Adam(params, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "fused": lambda params: torch.optim.Adam(params, lr=1e-2, fused=True),
    "foreach": lambda params: torch.optim.Adam(params, lr=1e-2, foreach=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "not all of them": lambda params: torch.optim.Adam(params[1:], lr=1e-2),
    "two groups": lambda params: torch.optim.Adam([{"params": params[:2], "lr": 0.1}, {"params": params[2:]}]),
}


def gradients(params: list[nn.Parameter], step: int) -> dict[nn.Parameter, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {param: torch.randn(param.shape, generator=generator) for param in params}


def with_gradients(gradients: dict[nn.Parameter, Tensor]) -> Tensor:
    """A loss that has them."""
    return sum((torch.sum(param * gradient) for param, gradient in gradients.items()), torch.zeros(()))


def stepped(kind: str, flat: bool, missing: Any = (), max_norm: float = math.inf) -> tuple[list[nn.Parameter], Any]:
    """Parameters and optimiser after two blocks of five steps; ``missing[step]`` has no gradient at that step."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = OPTIMIZERS[kind](params)
    for block in range(2):
        with FlatOptimizer(optimizer, nn.ParameterList(params)) as flat_optimizer:
            for step in range(5 * block, 5 * block + 5):
                found = gradients(params, step)
                if step in missing:
                    del found[params[1]]
                if flat:
                    assert flat_optimizer.descend(with_gradients(found), max_norm)
                    continue
                optimizer.zero_grad()
                with_gradients(found).backward()
                if max_norm < math.inf:
                    torch.nn.utils.clip_grad_norm_(params, max_norm)
                optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("missing", [(), (3,), (0, 1, 2, 3, 4), tuple(range(10))], ids=str)
@pytest.mark.parametrize("max_norm", [math.inf, 0.5, 100.0])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_bit_for_bit_the_same_steps_and_state(kind: str, missing: Any, max_norm: float) -> None:
    (ours, our_optimizer), (theirs, their_optimizer) = (
        stepped(kind, flat, missing, max_norm) for flat in (True, False)
    )
    for mine, peer in zip(ours, theirs, strict=True):
        assert torch.equal(mine, peer)
        state, peer_state = our_optimizer.state.get(mine, {}), their_optimizer.state.get(peer, {})
        assert state.keys() == peer_state.keys()
        assert all(torch.equal(state[key], peer_state[key]) for key in state)
    assert our_optimizer.state_dict()["param_groups"] == their_optimizer.state_dict()["param_groups"]


def test_fused_steps_are_the_same_but_for_rounding() -> None:
    params = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    plain = copy.deepcopy(params)
    for tensors, fused in ((params, True), (plain, False)):
        with FlatOptimizer(OPTIMIZERS["adam"](tensors), nn.ParameterList(tensors), fused=fused) as optimizer:
            for step in range(20):
                optimizer.descend(with_gradients(gradients(tensors, step)))
    for mine, peer in zip(params, plain, strict=True):
        torch.testing.assert_close(mine, peer, rtol=1e-5, atol=1e-6)


def test_the_state_is_written_back_when_an_exception_leaves_the_block() -> None:
    params = [nn.Parameter(torch.ones(3))]
    optimizer = OPTIMIZERS["adam"](params)
    with pytest.raises(KeyboardInterrupt), FlatOptimizer(optimizer, nn.ParameterList(params)) as flat:
        flat.descend(with_gradients(gradients(params, 0)))
        raise KeyboardInterrupt
    assert float(optimizer.state[params[0]]["step"]) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_moves_nothing(bad: float) -> None:
    params = [nn.Parameter(torch.ones(3))]
    with FlatOptimizer(OPTIMIZERS["adam"](params), nn.ParameterList(params)) as optimizer:
        assert not optimizer.descend(with_gradients({params[0]: torch.tensor([1.0, bad, 0.0])}), max_norm=1.0)
    assert torch.equal(params[0], torch.ones(3))


def descended(params: list[nn.Parameter], optimizer: Any, steps: int, start: int = 0) -> None:
    """Step along `gradients`, written into a vector."""
    with FlatDescent(optimizer, params) as descent:
        for step in range(start, start + steps):
            for param, gradient in gradients(params, step).items():
                descent.gradients[param].copy_(gradient)
            descent.step()


@pytest.mark.parametrize("kind", ["adam", "adamw", "amsgrad"])
def test_a_descent_takes_the_optimisers_steps_but_for_rounding(kind: str) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    peers = copy.deepcopy(params)
    optimizer, theirs = OPTIMIZERS[kind](params), OPTIMIZERS[kind](peers)
    for block in range(3):
        optimizer.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = 1e-2 / (block + 1)
        descended(params, optimizer, 4, 4 * block)
        for step in range(4 * block, 4 * block + 4):
            for param, gradient in gradients(peers, step).items():
                param.grad = gradient
            theirs.step()
        for mine, peer in zip(params, peers, strict=True):
            torch.testing.assert_close(mine, peer, rtol=1e-5, atol=1e-6)
            assert mine.grad is not None and peer.grad is not None
            assert torch.equal(mine.grad, peer.grad)
            assert optimizer.state[mine].keys() == theirs.state[peer].keys()
            for key, value in theirs.state[peer].items():
                torch.testing.assert_close(optimizer.state[mine][key], value, rtol=1e-5, atol=1e-6)
    assert optimizer.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]


def test_a_descent_without_a_step_leaves_all_as_it_was() -> None:
    params = [nn.Parameter(torch.ones(3))]
    optimizer = OPTIMIZERS["adam"](params)
    descended(params, optimizer, 0)
    assert params[0].grad is None
    assert not optimizer.state
    assert torch.equal(params[0], torch.ones(3))


def test_a_descent_is_written_back_when_an_exception_leaves_the_block() -> None:
    params = [nn.Parameter(torch.ones(3))]
    optimizer = OPTIMIZERS["adam"](params)
    with pytest.raises(KeyboardInterrupt), FlatDescent(optimizer, params) as descent:
        descent.gradient.fill_(2.0)
        descent.step()
        assert torch.equal(params[0], torch.ones(3))  # in the block they are elsewhere
        torch.testing.assert_close(descent.parameters[params[0]], torch.full((3,), 0.99))
        raise KeyboardInterrupt
    torch.testing.assert_close(params[0].detach(), torch.full((3,), 0.99))
    assert torch.equal(params[0].grad, torch.full((3,), 2.0))
    assert float(optimizer.state[params[0]]["step"]) == 1


def test_what_can_descend() -> None:
    params = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    able = {kind: can_descend(make(params), nn.ParameterList(params), params) for kind, make in OPTIMIZERS.items()}
    assert {kind for kind, can in able.items() if can} == {"adam", "amsgrad", "adamw"}
    optimizer = OPTIMIZERS["adam"](params)
    descended(params[:2], optimizer, 1)
    assert can_descend(optimizer, nn.ParameterList(params), params[:2])
    assert not can_descend(optimizer, nn.ParameterList(params), params)
    assert not can_descend(optimizer, nn.ParameterList(params[:2]), params[:2])


def test_who_waits_for_a_gradient_is_known() -> None:
    param, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    assert not is_awaited(param)
    handle = torch.autograd.graph.register_multi_grad_hook([param], lambda grads: None)
    assert is_awaited(param) and is_awaited(param) and not is_awaited(other)
    handle.remove()
    del handle
    assert not is_awaited(param)
    graph = 2 * param
    assert is_awaited(param)
    graph.sum().backward()
    del graph
    assert not is_awaited(param)
    with torch.no_grad():
        kept = 2 * param
    assert not is_awaited(param)
    assert not kept.requires_grad
