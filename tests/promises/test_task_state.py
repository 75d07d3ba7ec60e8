"""What is remembered from update to update belongs to one environment and one policy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from envs import SMALL, RandomEnv, make, with_rollout
from stable_baselines3.common.vec_env import DummyVecEnv
from test_recurrent import collected
from torch import Tensor

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, RecurrentNPG, RecurrentPPOClip, RecurrentTRPO
from sb3_trpo_ext.core.natural_step import Acceptance, Evaluation, Step
from sb3_trpo_ext.critic.gauss_newton import GaussNewtonCritic
from sb3_trpo_ext.policy.problem import PolicyProblem
from sb3_trpo_ext.training import natural_gradient
from sb3_trpo_ext.training.natural_gradient import PolicyStep

REMEMBERING: dict[str, tuple[Any, dict[str, Any]]] = {
    "momentum": (TRPO, {"momentum": 0.9}),
    "reuse": (TRPO, {"sample_reuse": 3}),
    "both": (TRPO, {"momentum": 0.9, "sample_reuse": 2, "target_kl": 0.001}),
    "recurrent": (RecurrentTRPO, {"momentum": 0.9}),
    "maskable": (MaskableTRPO, {"sample_reuse": 2}),
    "critic": (TRPO, {"critic_kwargs": {"n_rollouts": 3}}),
    "critic of npg": (NPG, {"critic": "adam", "batch_size": 16, "critic_kwargs": {"n_rollouts": 2}}),
}
ARGUMENTS = ("momentum", "sample_reuse", "critic", "critic_kwargs", "batch_size")


@pytest.fixture(params=REMEMBERING)
def trained(request: pytest.FixtureRequest) -> Any:
    algorithm, options = REMEMBERING[request.param]
    model = make(algorithm, **options).learn(96)
    assert remembers(model)
    return model


def remembers(model: Any) -> bool:
    return memory_of(model) is not None or bool(model._past_rollouts)


def memory_of(model: Any) -> Any:
    return getattr(model, "gradient_memory", None)


def other_env() -> DummyVecEnv:
    return DummyVecEnv([lambda: RandomEnv(episode_length=3)])


def replaced(model: Any, how: str, folder: Path) -> Any:
    """The model, or a loaded copy, after something of it was replaced."""
    if how == "set_env":
        model.set_env(other_env())
    elif how == "set_env without reset":
        model.set_env(other_env(), force_reset=False)
    elif how == "set_parameters":
        parameters = model.get_parameters()
        parameters["policy"] = {name: value + 0.1 for name, value in parameters["policy"].items()}
        model.set_parameters(parameters)
    else:
        model.save(folder / "model")
        return type(model).load(folder / "model", env=other_env() if how == "load" else None, device="cpu")
    return model


HOW = ["set_env", "set_env without reset", "set_parameters", "load", "load without environment"]


@pytest.mark.parametrize("how", HOW)
def test_memory_is_dropped_with_what_it_belongs_to(trained: Any, how: str, tmp_path: Path) -> None:
    model = replaced(trained, how, tmp_path)
    assert memory_of(model) is None and model._past_rollouts == () and model._theta_left is None
    if how != "load without environment":
        model.learn(32, reset_num_timesteps=False)
        assert len(model._past_rollouts) <= 1
        assert model.logger.name_to_value.get("train/momentum", 0.0) == 0.0
        model.learn(64)
        assert remembers(model)


def test_the_first_update_elsewhere_is_that_of_a_model_without_a_past(trained: Any, tmp_path: Path) -> None:
    fresh = make(type(trained), **{name: getattr(trained, name) for name in ARGUMENTS if hasattr(trained, name)})
    fresh.target_kl = trained.target_kl
    fresh.set_parameters(trained.get_parameters())
    for model in (trained, fresh):
        model.set_env(other_env())
        model.env.seed(3)
        model.set_random_seed(3)
        model._current_progress_remaining = 1.0
        model.learn(32)
    for one, other in zip(trained.policy.parameters(), fresh.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_memory_stays_in_the_same_environment_with_the_same_policy(trained: Any) -> None:
    memory, past = memory_of(trained), trained._past_rollouts
    trained.set_env(trained.env)
    assert memory_of(trained) is memory and trained._past_rollouts is past


def test_a_file_of_an_older_version_brings_no_memory_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(TRPO, momentum=0.9).learn(64)
    excluded = model._excluded_save_params()
    monkeypatch.setattr(TRPO, "_excluded_save_params", lambda self: [e for e in excluded if e != "gradient_memory"])
    model.save(tmp_path / "model")
    assert TRPO.load(tmp_path / "model", env=other_env()).gradient_memory is None


@pytest.mark.parametrize("how", ["set_env", "load", "learn again"])
def test_growing_rollouts_begin_again_with_n_steps(how: str, tmp_path: Path) -> None:
    model = make(TRPO, n_steps=16, final_n_steps=64).learn(200)
    assert model.rollout_buffer.buffer_size > 16
    model = replaced(model, how, tmp_path) if how != "learn again" else model
    model.learn(16)
    assert model.rollout_buffer.buffer_size == 16


@pytest.mark.parametrize("algorithm", [RecurrentTRPO, RecurrentNPG, RecurrentPPOClip])
@pytest.mark.parametrize("how", HOW)
def test_hidden_states_begin_at_zero(algorithm: Any, how: str, tmp_path: Path) -> None:
    options = {"batch_size": 16} if algorithm is RecurrentPPOClip else {}
    model = make(algorithm, **options).learn(40)
    assert any(bool((state != 0).any()) for pair in model._last_lstm_states for state in pair)
    model = replaced(model, how, tmp_path)
    assert all(bool((state == 0).all()) for pair in model._last_lstm_states for state in pair)


def test_hidden_states_have_the_shape_of_the_new_environments(tmp_path: Path) -> None:
    model = collected(n_envs=3)
    model.save(tmp_path / "model")
    loaded = RecurrentTRPO.load(tmp_path / "model", env=collected(n_envs=2).env, device="cpu")
    for pair in loaded._last_lstm_states:
        for state in pair:
            assert state.shape == (1, 2, 6) and not state.any()
    loaded.learn(48)


def test_reported_reasons_are_reported_again_in_another_environment() -> None:
    model = make(TRPO)
    model._report_rejection("it is a test")
    model.set_env(other_env())
    assert model._reported_rejections == [] and model._rejections_in_a_row == 0


def test_an_environment_may_be_set_before_the_networks_are_made() -> None:
    model = TRPO("MlpPolicy", RandomEnv(), **SMALL, _init_setup_model=False)
    model.set_env(other_env())
    model._setup_model()
    model.learn(32)
    assert np.all(model.rollout_buffer.values != 0)


# Momentum: what is ascended, when it is forgotten, and that it travels with the model


MU = 0.6


class Watched(TRPO):
    """Remembers gradients and what was ascended; can be told to reject."""

    gradients: list[Tensor]
    vectors: list[Tensor]
    reject: set[int]

    def _policy_step(self, problem: PolicyProblem) -> PolicyStep:
        self.gradients.append(problem.gradient.clone())
        return super()._policy_step(problem)

    def _step_along(self, problem: PolicyProblem, vector: Tensor, most_trials: int) -> PolicyStep:
        self.vectors.append(vector.clone())
        if len(self.vectors) in self.reject:
            return Step(problem.start, reason="told to")
        return super()._step_along(problem, vector, most_trials)


def watched(updates: int, reject: set[int] | None = None, **options: Any) -> Watched:
    model = make(Watched, n_steps=64, momentum=MU, **options)
    model.gradients, model.vectors, model.reject = [], [], reject or set()
    for _ in range(updates):
        with_rollout(model)
        model.train()
    return model


def equal(a: Tensor | np.ndarray | None, b: Tensor) -> None:
    np.testing.assert_allclose(np.asarray(a), b.numpy(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("action", ["box", "discrete", "multibinary"])
def test_what_is_ascended_is_the_heavy_ball(action: str) -> None:
    model = watched(3, action=action)
    g1, g2, g3 = model.gradients
    assert len(model.vectors) == 3
    for vector, expected in zip(model.vectors, (g1, g2 + MU * g1, g3 + MU * (g2 + MU * g1)), strict=True):
        equal(vector, expected)
    equal(model.gradient_memory, model.vectors[-1])
    assert model.logger.name_to_value["train/momentum"] == MU


def test_the_direction_is_the_fisher_solution_of_the_heavy_ball(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[tuple[Any, Tensor, Tensor]] = []
    solve = natural_gradient.natural_direction

    def recorded(fisher: Any, problem: Any, vector: Tensor, **options: Any) -> Any:
        direction = solve(fisher, problem, vector, **options)
        dense = torch.stack([fisher(unit) for unit in torch.eye(len(vector))])
        solved.append((dense, vector, direction.x))
        return direction

    monkeypatch.setattr(natural_gradient, "natural_direction", recorded)
    model = watched(2, action="box", policy_kwargs={"net_arch": [4]}, cg_max_steps=200, cg_residual_tol=1e-6)
    dense, vector, solution = solved[1]
    equal(vector, model.gradients[1] + MU * model.gradients[0])
    np.testing.assert_allclose(solution, torch.linalg.solve(dense, vector), rtol=2e-3, atol=1e-4)


def test_a_rejected_step_falls_back_on_the_plain_direction_and_forgets() -> None:
    model = watched(2, reject={2})
    g1, g2 = model.gradients
    assert len(model.vectors) == 3
    equal(model.vectors[1], g2 + MU * g1)
    equal(model.vectors[2], g2)
    equal(model.gradient_memory, g2)
    log = model.logger.name_to_value
    assert log["train/momentum"] == 0.0 and log["train/is_line_search_success"] == 1.0


def test_a_fraction_of_the_heavy_ball_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rejection = Acceptance.rejection

    def not_whole(self: Acceptance, evaluation: Evaluation, fraction: float) -> str:
        return "too far" if fraction == 1.0 else rejection(self, evaluation, fraction)

    monkeypatch.setattr(Acceptance, "rejection", not_whole)
    model = watched(2)
    log = model.logger.name_to_value
    assert log["train/momentum"] == 0.0 and 0.0 < log["train/step_fraction"] < 1.0
    equal(model.vectors[-1], model.gradients[-1])


def test_nothing_is_remembered_of_a_step_that_was_not_taken() -> None:
    model = watched(1)
    model.line_search_accept_ratio = 1 - 1e-12
    model.line_search_max_iter = 1
    before = [parameter.clone() for parameter in model.policy.parameters()]
    actor = [name for name, _ in model.policy.named_parameters() if "value" not in name]
    with_rollout(model)
    model.train()
    assert not model.logger.name_to_value["train/is_line_search_success"]
    assert model.gradient_memory is None
    for (name, now), then in zip(model.policy.named_parameters(), before, strict=True):
        assert name not in actor or bool((now == then).all())


def test_an_update_that_is_undone_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = watched(1)
    memory = model.gradient_memory
    assert memory is not None
    with_rollout(model)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(GaussNewtonCritic, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.train()
    assert model.gradient_memory is memory


@pytest.mark.parametrize("algorithm", [TRPO, RecurrentTRPO, MaskableTRPO])
def test_a_saved_model_begins_with_its_plain_gradient(algorithm: Any, tmp_path: Path) -> None:
    action = "discrete" if algorithm is MaskableTRPO else "box"
    model = make(algorithm, action=action, momentum=MU)
    model.learn(3 * model.n_steps)
    assert model.gradient_memory is not None
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=model.env)
    assert loaded.momentum == MU and loaded.gradient_memory is None
    loaded.learn(loaded.n_steps)
    assert loaded.logger.name_to_value["train/momentum"] == 0
    loaded.learn(loaded.n_steps)
    assert loaded.logger.name_to_value["train/momentum"] == MU


def test_a_memory_of_other_parameters_is_left_behind() -> None:
    model = watched(1)
    for parameter in model.policy.mlp_extractor.policy_net.parameters():
        parameter.requires_grad_(False)
    with_rollout(model)
    model.train()
    assert model.gradients[1].shape != model.gradients[0].shape
    equal(model.vectors[1], model.gradients[1])
    equal(model.gradient_memory, model.gradients[1])


def test_without_momentum_nothing_is_remembered() -> None:
    model = with_rollout(make(TRPO))
    model.train()
    assert model.gradient_memory is None


@pytest.mark.parametrize("value", [1.0, -0.1, 2, float("nan"), "much"])
def test_an_impossible_momentum_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="`momentum`"):
        make(TRPO, momentum=value)


def test_npg_says_why_it_has_none() -> None:
    with pytest.raises(TypeError, match=r"momentum.*use the class TRPO"):
        make(NPG, momentum=0.5)


def nudge(scope: dict[str, Any], _: Any) -> bool:
    """A callback that changes a parameter by next to nothing."""
    with torch.no_grad():
        next(scope["self"].policy.parameters()).add_(1e-6)
    return True


def test_parameters_that_a_callback_changes_leave_hidden_states_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(RecurrentTRPO, momentum=0.5, n_steps=8).learn(8)
    model.learn(32, callback=nudge, reset_num_timesteps=False)
    assert model._last_lstm_states.pi[0].abs().sum() > 0
    monkeypatch.setattr(TRPO, "_policy_step", lambda self, problem: Step(problem.start, reason="told to"))
    model = make(TRPO, momentum=0.5)
    model.learn(32 * 3, callback=nudge)
    assert model._rejections_in_a_row == 3
