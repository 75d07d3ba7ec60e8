"""The policy gradient is left in p.grad; and gradients are taken whatever the caller has switched off."""

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from envs import make, with_rollout
from torch import nn

from sb3_trpo_ext import (
    NPG,
    TRPO,
    MaskableTRPO,
    PPOClip,
    PPOPenalty,
    RecurrentNPG,
    RecurrentPPOClip,
    RecurrentTRPO,
)
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
