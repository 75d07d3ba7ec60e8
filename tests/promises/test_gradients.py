"""The policy gradient is left in p.grad; and gradients are taken whatever the caller has switched off."""

import copy
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, OBSERVATION_SPACES, RandomEnv, make, with_rollout
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sb3_trpo_ext import (
    NPG,
    TRPO,
    MaskableTRPO,
    PPOClip,
    PPOPenalty,
    RecurrentNPG,
    RecurrentPPOClip,
    RecurrentTRPO,
    register_distribution,
)
from sb3_trpo_ext.core.flat_optimizer import LARGEST_FLAT, FlatOptimizer
from sb3_trpo_ext.policy import distributions
from sb3_trpo_ext.policy.distributions import GaussianFamily
from sb3_trpo_ext.policy.evaluation import consistent_evaluation
from sb3_trpo_ext.rollout.buffers import whole_rollout

NATURAL = [TRPO, NPG, RecurrentTRPO, RecurrentNPG, MaskableTRPO]
ALGORITHMS = [*NATURAL, PPOClip, PPOPenalty, RecurrentPPOClip]
ADAM = {"critic": "adam", "batch_size": 16}
BY_ITSELF = {**ADAM, "policy_kwargs": {"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}}}
CRITICS = {"gauss-newton": {"critic": "gauss_newton"}, "adam": ADAM, "an optimiser of another kind": BY_ITSELF}


def by_the_book(model: Any) -> dict[str, torch.Tensor | None]:
    """Gradients of minus the surrogate at θ_old, as a backward pass leaves them."""
    with consistent_evaluation(model.policy):
        batch = whole_rollout(model.rollout_buffer, model.action_space).with_normalized_advantages()
        model.policy.zero_grad()
        _, log_prob, _ = batch.evaluate_actions(model.policy)
        (-batch.mean(torch.exp(log_prob - batch.old_log_prob) * batch.advantages)).backward()
    grads = {name: param.grad for name, param in model.policy.named_parameters()}
    model.policy.zero_grad()
    return {name: None if grad is None else grad.clone() for name, grad in grads.items()}


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("algorithm", NATURAL)
def test_the_gradient_of_minus_the_surrogate_is_left(algorithm: Any, critic: str) -> None:
    model = with_rollout(make(algorithm, "discrete" if algorithm is MaskableTRPO else "box", **CRITICS[critic]))
    expected = by_the_book(model)
    model.train()
    found = 0
    for name, param in model.policy.named_parameters():
        if expected[name] is None:
            assert (param.grad is None) == (critic == "gauss-newton"), name  # an optimiser's stay, as in sb3-contrib
        else:
            torch.testing.assert_close(param.grad, expected[name], rtol=1e-3, atol=1e-6)
            found += 1
    assert found >= 4


def test_a_frozen_parameter_loses_what_was_left_before() -> None:
    model = with_rollout(make(TRPO, "box"))
    model.train()
    assert model.policy.log_std.grad is not None
    model.policy.log_std.requires_grad_(False)
    with_rollout(model).train()
    assert model.policy.log_std.grad is None
    assert model.policy.action_net.weight.grad is not None


def test_a_rejected_step_leaves_it_too() -> None:
    model = with_rollout(make(TRPO, "box", line_search_accept_ratio=0.999999, line_search_max_iter=1, target_kl=1.0))
    model.train()
    assert not model.logger.name_to_value["train/is_line_search_success"]
    assert model.policy.action_net.weight.grad.norm() > 0


def test_a_norm_logged_by_a_callback() -> None:
    model = make(TRPO, "box")
    norms: list[float] = []

    def log_norm(scope: dict[str, Any], _: Any) -> bool:
        if model._n_updates:
            left = [param.grad for param in model.policy.parameters() if param.grad is not None]
            norms.append(float(torch.stack([grad.norm() for grad in left]).norm()))
        return True

    model.learn(96, callback=log_norm)
    assert len(set(norms)) == 2
    assert min(norms) > 0


@pytest.mark.parametrize("critic", CRITICS)
def test_the_critics_optimiser_does_not_step_on_it(critic: str) -> None:
    """Two updates end the same whether or not the gradients of the first are still there."""
    ends = []
    for wiped in (False, True):
        model = make(TRPO, "box", **CRITICS[critic])
        for _ in range(2):
            np.random.seed(0)
            with_rollout(model).train()
            if wiped:
                model.policy.zero_grad()
        ends.append([param.detach().clone() for param in model.policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_it_is_in_no_copy_and_no_file(tmp_path: Any) -> None:
    model = with_rollout(make(TRPO, "box"))
    model.train()
    assert any(param.grad is not None for param in model.policy.parameters())
    file = io.BytesIO()
    torch.save(model.policy, file)
    model.save(tmp_path / "model")
    copies = [
        copy.deepcopy(model.policy),
        torch.load(io.BytesIO(file.getvalue()), weights_only=False),
        TRPO.load(tmp_path / "model", device="cpu").policy,
    ]
    assert all(param.grad is None for other in copies for param in other.parameters())


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
}
FORMS: dict[str, dict[str, Any]] = {"box": {}, "sde": {"use_sde": True, "sde_sample_freq": 4}, "discrete": {}}


@pytest.mark.parametrize(
    ("mode", "form", "fast"),
    [*((mode, "discrete", True) for mode in MODES), *(("inference_mode", form, False) for form in FORMS)],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_learning_is_the_same_where_gradients_are_off(algorithm: Any, fast: bool, form: str, mode: str) -> None:
    if algorithm is MaskableTRPO and form != "discrete":
        pytest.skip("only discrete actions are masked")
    action = "discrete" if form == "discrete" else "box"
    ends = []
    for switched_off in (False, True):
        model = make(algorithm, action, fast_rollouts=fast, **FORMS[form])
        start = nn.utils.parameters_to_vector(model.policy.parameters()).detach()
        np.random.seed(0)
        torch.manual_seed(0)
        if switched_off:
            with MODES[mode]():
                model.learn(64)
                assert not torch.is_grad_enabled()
            assert torch.is_grad_enabled()
        else:
            model.learn(64)
        model.learn(32, reset_num_timesteps=False)
        ends.append(nn.utils.parameters_to_vector(model.policy.parameters()).detach())
        assert not torch.equal(start, ends[-1])
    assert torch.equal(*ends)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_model_made_and_loaded_there_learns(algorithm: Any, mode: str, tmp_path: Any) -> None:
    options = {"critic": "adam", "batch_size": 16} if algorithm in NATURAL else {}
    with MODES[mode]():
        model = make(algorithm, **options).learn(32)
        model.save(tmp_path / "model")
        loaded = algorithm.load(tmp_path / "model", env=model.get_env(), device="cpu")
        start = nn.utils.parameters_to_vector(loaded.policy.parameters()).clone()
        loaded.learn(32, reset_num_timesteps=False)
    loaded.learn(32, reset_num_timesteps=False)
    assert not torch.equal(start, nn.utils.parameters_to_vector(loaded.policy.parameters()))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_cannot_have_gradients_is_refused(algorithm: Any) -> None:
    model = make(algorithm)
    with torch.inference_mode():
        model.policy.value_net = nn.Linear(model.policy.value_net.in_features, 1)
    with pytest.raises(RuntimeError, match=r"inference_mode.*outside"):
        model.learn(32)


# Gradients and optimisers look to users' code as they do in SB3's PPO, and to whoever watches at every step


OPTIONS: dict[str, Any] = {
    "batch_size": 12,
    "n_epochs": 2,
    "learning_rate": 1e-3,
    "policy_kwargs": {"net_arch": [6]},
}
Event = tuple[Any, ...]


def model_of(algorithm: Any, **options: Any) -> Any:
    if issubclass(algorithm, (PPOClip, PPOPenalty)):
        options |= {"fast_rollouts": False, "fast_updates": options.get("fast_updates", False)}
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


# Whoever watches, and whatever is not of plain layers, gets autograd


class OwnLoss(PPOClip):
    def _policy_loss(self, part: Any, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        return super()._policy_loss(part, ratio, advantages)


class OwnPenalty(PPOPenalty):
    def _losses(self, part: Any) -> Any:
        return super()._losses(part)


class OwnBuffer(RolloutBuffer):
    pass


class OwnPolicy(ActorCriticPolicy):
    def evaluate_actions(self, obs: Any, actions: Tensor) -> Any:
        return super().evaluate_actions(obs, actions)


class OwnGaussian(GaussianFamily):
    pass


def path_of(model: Any) -> str:
    with_rollout(model).train()
    return model.update_path


OF_FIRST_ORDER = {"post hook", "pre hook", "global post hook", "global pre hook", "wrapped step", "scheduler"} | {
    "wrapped zero_grad",
    "wrapped class",
}


@pytest.mark.parametrize("name", WATCHERS)
@pytest.mark.parametrize("algorithm", [PPOClip, PPOPenalty, TRPO, NPG])
def test_whoever_watches_has_autograd_as_long_as_he_does(algorithm: Any, name: str) -> None:
    model = make(algorithm, "box", batch_size=16, **({"critic": "adam"} if algorithm in NATURAL else {}))
    assert path_of(model) == "fast"
    looks: list[Any] = []
    with WATCHERS[name](model, lambda *args: looks.append(args)):
        if algorithm in NATURAL and name == "multi-grad hook":  # which torch allows in `backward` alone
            model._stand_in()
            assert "hook" in model.update_path
            return
        path = path_of(model)
    if algorithm in NATURAL and name in OF_FIRST_ORDER:
        assert path == "fast"  # of the policy's step; the critic asks for itself
    else:
        assert path.startswith("autograd: ") and any(word in path for word in ("hook", "waits"))
    assert looks or name in ("noisy parameter hook", "module hook")
    if name not in ("scheduler", "wrapped step", "wrapped zero_grad"):  # torch's schedulers leave a wrapper behind
        assert path_of(model) == "fast"


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("algorithm", [PPOClip, TRPO])
def test_backward_hooks_of_modules_have_autograd(algorithm: Any, kind: str) -> None:
    model = make(algorithm, "box")
    looks: list[Any] = []
    with undoing(getattr(model.policy.value_net, kind)(lambda *_: looks.append(1))):
        assert "hook" in path_of(model)
        assert looks
    assert path_of(model) == "fast"
    with undoing(nn.modules.module.register_module_full_backward_hook(lambda *_: looks.append(2))):
        assert "hook" in path_of(model)
        assert 2 in looks
    assert path_of(model) == "fast"


def test_a_graph_that_somebody_keeps_has_autograd() -> None:
    model = make(PPOClip, "box")
    kept = model.policy.log_std.exp()
    assert "waits for the gradient" in path_of(model)
    del kept
    assert path_of(model) == "fast"


def frozen(model: Any) -> None:
    model.policy.action_net.bias.requires_grad_(False)


def shared(model: Any) -> None:
    model.policy.mlp_extractor.value_net = model.policy.mlp_extractor.policy_net


def twice(model: Any) -> None:
    model.policy.mlp_extractor.policy_net[2] = model.policy.mlp_extractor.policy_net[0]


def tied(model: Any) -> None:
    model.policy.mlp_extractor.value_net[0].weight = model.policy.mlp_extractor.policy_net[0].weight


def own_module(model: Any) -> None:
    model.policy.mlp_extractor.policy_net.append(nn.Dropout(0.1))


def double(model: Any) -> None:
    model.policy.log_std.data = model.policy.log_std.data.double()


def strided(model: Any) -> None:
    weight = model.policy.action_net.weight
    weight.data = weight.data.t().contiguous().t()


def own_method(model: Any) -> None:
    model.policy.evaluate_actions = model.policy.evaluate_actions


def compiled_part(model: Any) -> None:
    model.policy.mlp_extractor = torch.compile(model.policy.mlp_extractor, backend="eager")


def compiled(model: Any) -> None:
    model.policy = torch.compile(model.policy, backend="eager")


def own_family(model: Any) -> None:
    register_distribution(DiagGaussianDistribution, lambda _: OwnGaussian())


def two_groups(model: Any) -> None:
    optimizer = model.policy.optimizer
    params = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = params[:2]
    optimizer.add_param_group({"params": params[2:], "lr": 1e-4})


def missing(model: Any) -> None:
    model.policy.optimizer.param_groups[0]["params"].pop()


def strange(model: Any) -> None:
    model.policy.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def uneven(model: Any) -> None:
    with_rollout(model).train()
    del model.policy.optimizer.state[model.policy.log_std]


def replaced_loss(model: Any) -> None:
    policy_loss = model._policy_loss
    model._policy_loss = lambda *args: policy_loss(*args)


NARROW: dict[str, Any] = {"policy_kwargs": {"net_arch": [5, 5]}}
SGD: dict[str, Any] = {"policy_kwargs": {"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {}}}
OTHERS: dict[str, tuple[list[Any], dict[str, Any], Any, str]] = {
    "switched off": ([PPOClip, TRPO], {"fast_updates": False}, None, "fast_updates=False"),
    "gsde": ([PPOClip, TRPO], {"use_sde": True}, None, "distribution StateDependentNoiseDistribution"),
    "lstm": ([RecurrentPPOClip, RecurrentTRPO, RecurrentNPG], {}, None, "a policy with memory"),
    "cnn": ([PPOClip, TRPO], {"observation": "image"}, None, "NatureCNN"),
    "dict with an image": ([PPOClip, NPG], {"observation": "dict"}, None, "CombinedExtractor with parts of its own"),
    "frozen": ([PPOClip, TRPO], {}, frozen, "frozen parameters"),
    "shared layers": ([PPOClip, TRPO], NARROW, shared, "layers that actor and critic share"),
    "a weight of both": ([PPOClip, TRPO], NARROW, tied, "layers that actor and critic share"),
    "a layer twice": ([PPOClip, TRPO], {"policy_kwargs": {"net_arch": [5, 5, 5]}}, twice, "a parameter in two places"),
    "own module": ([PPOClip, TRPO], {}, own_module, "layer Dropout"),
    "own policy": ([PPOClip, TRPO], {"policy": OwnPolicy}, None, "OwnPolicy has its own evaluate_actions"),
    "own method": ([PPOClip, TRPO], {}, own_method, "has its own evaluate_actions"),
    "own family": ([PPOClip, TRPO], {}, own_family, "a family of the user's own"),
    "compiled": ([PPOClip], {}, compiled, "policy of class OptimizedModule"),
    "compiled in part": ([PPOClip], {}, compiled_part, "mlp_extractor of class OptimizedModule"),
    "another precision": ([PPOClip], {}, double, "not float32"),
    "another layout": ([PPOClip, TRPO], {}, strided, "contiguous"),
    "own loss": ([OwnLoss], {}, None, "OwnLoss has its own _policy_loss"),
    "own losses": ([OwnPenalty], {}, None, "OwnPenalty has its own _losses"),
    "own loss of one model": ([PPOClip], {}, replaced_loss, "PPOClip has its own _policy_loss"),
    "own buffer": ([PPOClip], {"rollout_buffer_class": OwnBuffer}, None, "rollout buffer OwnBuffer"),
    "sgd": ([PPOClip, PPOPenalty], SGD, None, "optimizer SGD"),
    "two groups": ([PPOClip], {}, two_groups, "optimizer Adam with settings"),
    "not all parameters": ([PPOClip], {}, missing, "optimizer Adam with settings"),
    "foreign parameters": ([PPOClip], {}, strange, "optimizer Adam with settings"),
    "uneven state": ([PPOClip], {}, uneven, "optimizer Adam with settings"),
}


@pytest.mark.parametrize(
    ("name", "algorithm"), [(name, each) for name, (algorithms, *_) in OTHERS.items() for each in algorithms]
)
def test_what_is_not_covered_is_named(name: str, algorithm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributions, "_FACTORIES", dict(distributions._FACTORIES))
    _, options, change, words = OTHERS[name]
    if "policy" in options:
        env = RandomEnv(OBSERVATION_SPACES["vector"], ACTION_SPACES["box"])
        model = algorithm(env=env, n_steps=32, device="cpu", **options)
    else:
        model = make(algorithm, "box", **{"observation": "vector", **options})
    if change is not None:
        if name not in ("uneven state", "not all parameters"):
            assert path_of(model) == "fast"
        change(model)
    with_rollout(model)
    if name != "another precision":  # which no optimiser could step
        model.train()
    else:
        model._stand_in()
    assert model.update_path.startswith("autograd: ")
    assert words in model.update_path


def test_a_subclass_that_brings_both_its_losses_goes_by_hand() -> None:
    class Both(OwnLoss):
        def _loss_by_hand(self) -> Any:
            return super()._loss_by_hand()

        def _policy_loss(self, part: Any, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
            return super()._policy_loss(part, ratio, advantages)

    assert path_of(make(Both, "box")) == "fast"


def test_the_path_is_printed_when_it_changes(capsys: pytest.CaptureFixture[str]) -> None:
    model = make(PPOClip, "box", verbose=1)
    for fast in (True, True, False, False, True):
        model.fast_updates = fast
        path_of(model)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Updates: ")]
    assert printed == ["Updates: fast", "Updates: autograd: fast_updates=False", "Updates: fast"]
