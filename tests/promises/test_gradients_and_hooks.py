"""Gradients and optimisers look to users' code as they do in SB3's PPO, and to whoever watches at every step."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from envs import make, with_rollout
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sb3_trpo_ext import TRPO, PPOClip, PPOPenalty, RecurrentPPOClip
from sb3_trpo_ext.core.flat_optimizer import LARGEST_FLAT, FlatOptimizer

OPTIONS: dict[str, Any] = {
    "batch_size": 12,
    "n_epochs": 2,
    "learning_rate": 1e-3,
    "policy_kwargs": {"net_arch": [6]},
}
Event = tuple[Any, ...]


def model_of(algorithm: Any, **options: Any) -> Any:
    if issubclass(algorithm, (PPOClip, PPOPenalty)):
        options["fast_rollouts"] = False
    return make(algorithm, "box", **{**OPTIONS, **options})


def seen(model: Any, *more: Any) -> Event:
    """What a hook finds: parameters, gradients, and the optimiser's state, as comparable copies."""
    optimizer = model.policy.optimizer

    def numbers(tensor: Tensor | None) -> Any:
        return None if tensor is None else (tensor.detach() + 0.0).tolist()  # no negative zeros

    state = [{k: numbers(v) for k, v in optimizer.state.get(p, {}).items()} for p in model.policy.parameters()]
    params = [(numbers(p), numbers(p.grad)) for p in model.policy.parameters()]
    return (params, state, [group["lr"] for group in optimizer.param_groups], model._n_updates, *more)


@contextmanager
def undoing(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def optimizer_hook(kind: str, model: Any, look: Callable[..., None]) -> Any:
    return undoing(getattr(model.policy.optimizer, f"register_step_{kind}_hook")(look))


def global_hook(register: Any, model: Any, look: Callable[..., None]) -> Any:
    def only_ours(optimizer: Any, *args: Any) -> None:
        assert optimizer is model.policy.optimizer
        look()

    return undoing(register(only_ours))


def wrapped(method: str, model: Any, look: Callable[..., None]) -> Any:
    original = getattr(model.policy.optimizer, method)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        look()
        return original(*args, **kwargs)

    return mock.patch.object(model.policy.optimizer, method, wrapper)


def wrapped_class(model: Any, look: Callable[..., None]) -> Any:
    original = torch.optim.Adam.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert self is model.policy.optimizer
        look()
        return original(self, *args, **kwargs)

    return mock.patch.object(torch.optim.Adam, "step", step)


@contextmanager
def scheduler(model: Any, look: Callable[..., None]) -> Iterator[None]:
    """A learning rate that falls with every step of the optimiser, by a scheduler that its hook steps."""
    optimizer = model.policy.optimizer
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with undoing(optimizer.register_step_post_hook(lambda *_: (schedule.step(), look()))):
        yield


def parameter_hook(model: Any, look: Callable[..., None]) -> Any:
    return undoing(*(p.register_hook(lambda grad: look(grad.sum().item())) for p in model.policy.parameters()))


def noisy_hook(model: Any, look: Callable[..., None]) -> Any:
    """One that changes gradients."""
    return undoing(*(p.register_hook(lambda grad: grad.sign()) for p in model.policy.parameters()))


def accumulated_hook(model: Any, look: Callable[..., None]) -> Any:
    return undoing(*(p.register_post_accumulate_grad_hook(lambda p: look()) for p in model.policy.parameters()))


def multi_grad_hook(model: Any, look: Callable[..., None]) -> Any:
    hook = torch.autograd.graph.register_multi_grad_hook
    return undoing(hook(list(model.policy.parameters()), lambda grads: look()))


def module_hook(model: Any, look: Callable[..., None]) -> Any:
    """Calls of evaluation without a graph are ours alone."""

    def note(*_: Any) -> None:
        if torch.is_grad_enabled() and model.policy.training:
            look()

    return undoing(model.policy.mlp_extractor.register_forward_hook(note))


WATCHERS: dict[str, Any] = {
    "post hook": partial(optimizer_hook, "post"),
    "pre hook": partial(optimizer_hook, "pre"),
    "global post hook": partial(global_hook, register_optimizer_step_post_hook),
    "global pre hook": partial(global_hook, register_optimizer_step_pre_hook),
    "wrapped step": partial(wrapped, "step"),
    "wrapped zero_grad": partial(wrapped, "zero_grad"),
    "wrapped class": wrapped_class,
    "scheduler": scheduler,
    "parameter hook": parameter_hook,
    "noisy parameter hook": noisy_hook,
    "post-accumulate hook": accumulated_hook,
    "multi-grad hook": multi_grad_hook,
    "module hook": module_hook,
}


def watched(algorithm: Any, watcher: Any, **options: Any) -> tuple[list[Event], Any]:
    """What a watcher sees over two updates, and at the end."""
    model = model_of(algorithm, **options)
    events: list[Event] = []
    with watcher(model, lambda *args: events.append(seen(model, *[a for a in args if isinstance(a, float)]))):
        model.learn(64)
    return events, seen(model)


@pytest.mark.parametrize("name", WATCHERS)
def test_whoever_watches_sees_what_sb3_shows(name: str) -> None:
    theirs, their_end = watched(PPO, WATCHERS[name])
    ours, our_end = watched(PPOClip, WATCHERS[name])
    assert len(ours) == len(theirs)
    assert bool(theirs) == (name != "noisy parameter hook")
    assert ours == theirs
    assert our_end == their_end


@pytest.mark.parametrize("name", ["post hook", "post-accumulate hook", "wrapped step"])
def test_of_recurrent_policies_too(name: str) -> None:
    theirs, _ = watched(RecurrentPPO, WATCHERS[name])
    ours, _ = watched(RecurrentPPOClip, WATCHERS[name])
    assert theirs
    assert len(ours) == len(theirs)


@pytest.mark.parametrize("algorithm", [PPOPenalty, RecurrentPPOClip])
@pytest.mark.parametrize("name", sorted(WATCHERS.keys() - {"noisy parameter hook", "scheduler"}))
def test_a_look_changes_nothing(name: str, algorithm: Any) -> None:
    _, alone = watched(algorithm, lambda model, look: undoing())
    events, end = watched(algorithm, WATCHERS[name])
    assert end == alone
    assert all(grads is not None for _, grads in end[0])
    if name in ("post hook", "pre hook", "global post hook", "global pre hook", "wrapped step", "wrapped class"):
        assert len(events) == 2 * 2 * math.ceil(32 / 12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vf_coef": 0.0},
        {"ent_coef": 0.01, "max_grad_norm": 1e-3},
        {"target_kl": 1e-5},
        {"policy_kwargs": {"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {}}},
        {"policy_kwargs": {"net_arch": [512, 512]}},
    ],
    ids=lambda options: "-".join(options),
)
def test_gradients_are_left_as_sb3_leaves_them(options: dict[str, Any]) -> None:
    (_, theirs), (_, ours) = (watched(cls, lambda model, look: undoing(), **options) for cls in (PPO, PPOClip))
    assert ours == theirs
    assert all(grads is not None for _, grads in ours[0])


def test_parameters_that_the_loss_does_not_reach_or_the_optimizer_does_not_own() -> None:
    ends = []
    for algorithm in (PPO, PPOClip):
        model = model_of(algorithm)
        model.policy.unused = nn.Parameter(torch.ones(2))
        kept = [param for param in model.policy.parameters() if param is not model.policy.value_net.bias]
        model.policy.optimizer.param_groups[0]["params"] = kept
        model.learn(64)
        ends.append(seen(model))
        assert model.policy.unused.grad is None
    assert ends[0] == ends[1]


def test_a_plain_optimizer_steps_as_one_vector_still() -> None:
    model = model_of(PPOClip).learn(64)
    policy = model.policy
    assert sum(param.numel() for param in policy.parameters()) < LARGEST_FLAT
    assert not FlatOptimizer(policy.optimizer, policy)._by_itself
    for attach in WATCHERS.values():
        other = model_of(PPOClip)
        with attach(other, lambda *_: None):
            if attach is not multi_grad_hook:  # cannot be seen, but finds parameters and gradients as they are
                assert FlatOptimizer(other.policy.optimizer, other.policy)._by_itself
    assert not FlatOptimizer(policy.optimizer, policy)._by_itself


def test_the_profiler_counts_the_same_steps() -> None:
    counts = []
    for algorithm in (PPO, PPOClip):
        model = with_rollout(model_of(algorithm))
        with torch.profiler.profile() as profile:
            model.train()
        counts.append(sum("Optimizer.step" in event.name for event in profile.events()))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("watcher", [lambda model, look: undoing(), WATCHERS["post hook"]], ids=["plain", "hook"])
@pytest.mark.parametrize("algorithm", [PPOClip, PPOPenalty, TRPO])
def test_an_update_that_is_undone_leaves_the_gradients_of_before(algorithm: Any, watcher: Any) -> None:
    options = {"critic": "adam", "n_epochs": None} if algorithm is TRPO else {}
    model = make(algorithm, "box", **{k: v for k, v in {**OPTIONS, **options}.items() if v is not None})
    with watcher(model, lambda *_: None):
        with_rollout(model)
        model.train()
        before = seen(model)
        with_rollout(model)
        model.rollout_buffer.returns[:] = 1e30
        model.train()
        assert "not finite" in " ".join(model._reported_rejections)
        assert seen(model) == before


def test_an_epoch_that_is_rolled_back_leaves_the_gradients_of_before() -> None:
    model = with_rollout(model_of(PPOClip, max_kl=1e-12))
    model.train()
    assert all(param.grad is None for param in model.policy.parameters())


def test_the_critic_of_trpo_steps_with_its_hooks_and_without_gradients_of_the_actor() -> None:
    model = with_rollout(make(TRPO, "box", critic="adam", batch_size=12, n_critic_updates=2))
    policy, events = model.policy, []
    critic = {*policy.mlp_extractor.value_net.parameters(), *policy.value_net.parameters()}
    actor = [param for param in policy.parameters() if param not in critic]
    policy.optimizer.register_step_post_hook(lambda *_: events.append([param.grad for param in actor]))
    accumulated: list[nn.Parameter] = []
    policy.value_net.weight.register_post_accumulate_grad_hook(accumulated.append)
    for param in actor:
        param.grad = torch.full_like(param, 7.0)
    model.train()
    assert events == [[None] * len(actor)] * 2 * math.ceil(32 / 12)  # as in sb3-contrib
    assert len(accumulated) == len(events)
    assert all(param.grad is not None and param.grad.any() for param in critic)


def test_frozen_parameters_get_their_gradients_back_and_are_not_moved() -> None:
    for hooked in (False, True):
        module = nn.Linear(3, 2)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        if hooked:
            optimizer.register_step_post_hook(lambda *_: None)
        mark, bias = torch.full((2,), 7.0), module.bias.detach().clone()
        module.bias.grad = mark
        with FlatOptimizer(optimizer, module, {module.bias}) as flat:
            for _ in range(3):
                assert flat.descend(module(torch.ones(4, 3)).square().mean())
        assert module.bias.grad is mark
        assert torch.equal(mark, torch.full((2,), 7.0))
        assert torch.equal(module.bias, bias)
        assert float(optimizer.state[module.weight]["step"]) == 3
        assert module.bias not in optimizer.state
        assert module.weight.grad is not None
