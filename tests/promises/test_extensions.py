"""What a user adds without touching a file of the package: a distribution, a critic, a method, a reduction."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, OBSERVATION_SPACES, RandomEnv, in_float64, make, with_rollout
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn

from sb3_trpo_ext import NPG, TRPO, Critic, PPOClip, PPOPenalty, register_critic
from sb3_trpo_ext.core.natural_step import Acceptance, TrustRegion, backtrack, boundary_scale
from sb3_trpo_ext.core.parameters import flatten
from sb3_trpo_ext.core.reduction import Reduction
from sb3_trpo_ext.critic.base import Regression
from sb3_trpo_ext.policy.problem import PolicyProblem
from sb3_trpo_ext.rollout.buffers import whole_rollout
from sb3_trpo_ext.training.natural_gradient import NaturalGradientAlgorithm, PolicyStep

# A critic with a state of its own.


class ScaledCritic(Critic):
    """Ridge regression of the last layer on returns that a running mean and deviation bring to one scale.

    Args:
        ridge: λ of the regression.
        momentum: What remains of the old statistics at each rollout.
    """

    def __init__(self, ridge: float = 1e-3, momentum: float = 0.9) -> None:
        self.ridge, self.momentum = ridge, momentum
        self.mean, self.scale, self.fits = 0.0, 1.0, 0

    @torch.no_grad()
    def fit(self, regression: Regression) -> float:
        policy, batch, reduction = regression.policy, regression.batch, regression.batch.reduction
        mean = reduction.number(batch.mean(batch.returns))
        scale = reduction.number(batch.mean((batch.returns - mean).square())) ** 0.5
        keep = self.momentum if self.fits else 0.0
        self.mean = keep * self.mean + (1 - keep) * mean
        self.scale = keep * self.scale + (1 - keep) * max(scale, 1e-6)
        self.fits += 1
        seen = policy.extract_features(batch.inputs, policy.vf_features_extractor)
        latent = policy.mlp_extractor.forward_critic(seen)
        features = torch.cat([latent, torch.ones_like(latent[:, :1])], dim=1)
        weighted = features * batch.weights[:, None]
        gram = reduction.total(weighted.T @ features) + self.ridge * torch.eye(features.shape[1])
        targets = (batch.returns - self.mean) / self.scale
        solution = torch.linalg.solve(gram, reduction.total(weighted.T @ targets)) * self.scale
        policy.value_net.weight.copy_(solution[None, :-1])
        policy.value_net.bias.copy_(solution[-1:] + self.mean)
        return reduction.number(batch.mean((batch.values(policy) - batch.returns).square()))

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "scale": self.scale, "fits": self.fits}

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        self.mean, self.scale, self.fits = state["mean"], state["scale"], state["fits"]


register_critic("scaled", ScaledCritic)


@pytest.mark.parametrize("algorithm", [TRPO, NPG])
@pytest.mark.parametrize("critic", ["scaled", ScaledCritic])
def test_a_critic_with_state_is_saved_loaded_and_restored(algorithm: Any, critic: Any, tmp_path: Path) -> None:
    model = make(algorithm, critic=critic, critic_kwargs={"ridge": 1e-2}).learn(96)
    assert model.value_critic.fits == 3 and model.value_critic.ridge == 1e-2
    assert np.isfinite(model.logger.name_to_value["train/value_loss"])
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=model.env)
    assert loaded.value_critic.state_dict() == model.value_critic.state_dict()
    loaded.learn(32)
    assert loaded.value_critic.fits == 4


def test_a_rollout_of_another_length_leaves_the_critic_its_state() -> None:
    model = make(TRPO, critic="scaled").learn(64)
    critic = model.value_critic
    model.n_steps = 48
    model.learn(48, reset_num_timesteps=False)
    assert model.value_critic is critic and critic.fits == 3


def test_an_update_that_is_undone_puts_the_critic_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(TRPO, critic="scaled").learn(64)
    before = model.value_critic.state_dict()
    with_rollout(model)
    fit = ScaledCritic.fit

    def interrupted(self: ScaledCritic, regression: Regression) -> float:
        fit(self, regression)
        raise KeyboardInterrupt

    monkeypatch.setattr(ScaledCritic, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.train()
    assert model.value_critic.state_dict() == before


def test_what_is_no_critic_is_refused_with_those_that_are() -> None:
    for wrong in ("gauss", 3, nn.Linear):
        known = "'auto', 'action_value', 'gauss_newton', 'adam', 'semi_gradient'"
        with pytest.raises(ValueError, match=rf"`critic` must be one of {known}.*got"):
            make(TRPO, critic=wrong)
    with pytest.raises(ValueError, match=r"`critic_kwargs` must be arguments of ScaledCritic, got \{'speed': 1\}"):
        make(TRPO, critic="scaled", critic_kwargs={"speed": 1})
    with pytest.raises(TypeError, match=r"`critic_class` must be a subclass of sb3_trpo_ext.Critic"):
        register_critic("mine", nn.Linear)  # type: ignore[arg-type]


# A method with another step rule.


class SteepestTRPO(NaturalGradientAlgorithm):
    """The trust region along the plain gradient: x = g in the place of F⁻¹g, its curvature by one Fisher product."""

    def __init__(self, policy: Any, env: Any, *, _init_setup_model: bool = True, **kwargs: Any) -> None:
        defaults = {
            "n_steps": 64,
            "batch_size": 64,
            "cg_max_steps": 1,
            "cg_damping": 0.0,
            "n_critic_updates": 10,
            "normalize_advantage": True,
            "target_kl": 0.01,
            "sub_sampling_factor": 1,
            "learning_rate": 1e-3,
            "gamma": 0.99,
            "gae_lambda": 0.95,
            "use_sde": False,
            "sde_sample_freq": -1,
        }
        super().__init__(policy, env, **{**defaults, **kwargs})
        if _init_setup_model:
            self._setup_model()

    def _policy_step(self, problem: PolicyProblem) -> PolicyStep:
        direction = self._direction(problem)  # one step of conjugate gradients is a multiple of g
        if not direction.is_usable:
            return self._no_direction(problem, direction)
        region = TrustRegion(self.trust_region_radius())
        size = boundary_scale(direction.curvature, region.radius)
        test = Acceptance(region, problem.start, size * direction.slope)
        return backtrack(problem, direction, size, test.rejection)


@pytest.mark.parametrize("action", ACTION_SPACES)
def test_a_method_with_another_step_rule(action: str, tmp_path: Path) -> None:
    model = make(SteepestTRPO, action).learn(64)
    assert 0 < model.logger.name_to_value["train/kl_divergence_loss"] <= model.trust_region_radius()
    problem = model._problem(batch_of(with_rollout(model)))
    step = model._policy_step(problem)
    moved = flatten(problem.params).detach() - problem.theta_old
    assert step.fraction and torch.cosine_similarity(moved, problem.gradient, dim=0) > 0.999
    model.save(tmp_path / "model")
    SteepestTRPO.load(tmp_path / "model", env=model.env).learn(32)


def batch_of(model: Any) -> Any:
    return whole_rollout(model.rollout_buffer, model.action_space)


# A reduction over two workers.


class Pair:
    """Where two workers meet."""

    def __init__(self) -> None:
        self.barrier, self.places = threading.Barrier(2, timeout=60), [None, None]

    def exchange(self, rank: int, mine: Any) -> list[Any]:
        self.places[rank] = mine
        self.barrier.wait()
        both = list(self.places)
        self.barrier.wait()
        return both


class FakeWorker(Reduction):
    """One of two workers that are threads."""

    workers = 2

    def __init__(self, pair: Pair, rank: int) -> None:
        self._pair, self._rank = pair, rank

    def total(self, share: Tensor) -> Tensor:
        first, second = self._pair.exchange(self._rank, share.detach())
        return first + second

    def _largest(self, here: Tensor) -> Tensor:
        return torch.maximum(*self._pair.exchange(self._rank, here))

    def gather(self, rows: Tensor) -> Tensor:
        return torch.cat(self._pair.exchange(self._rank, rows))

    def __deepcopy__(self, memo: Any) -> "FakeWorker":
        return self


FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "trpo": (TRPO, {"curvature_samples": None}),
    "trpo-max": (TRPO, {"curvature_samples": None, "trust_region": "max"}),
    "trpo-theory": (TRPO, {"curvature_samples": None, "kl_penalty": "theory", "gamma": 0.5}),
    "trpo-chunks": (TRPO, {"curvature_samples": None, "fisher_chunk_size": 7, "ent_coef": 0.1}),
    "trpo-adam": (TRPO, {"curvature_samples": None, "critic": "adam", "batch_size": 64, "n_critic_updates": 3}),
    "trpo-no-signal": (TRPO, {"curvature_samples": None, "gamma": 0.0}),
    "npg": (NPG, {"curvature_samples": None}),
    "ppo": (PPOClip, {"batch_size": 64, "n_epochs": 4}),
    "ppo-bounded": (PPOClip, {"batch_size": 64, "n_epochs": 4, "max_kl": 1e-5, "target_kl": 1e-3}),
    "ppo-penalty": (PPOPenalty, {"batch_size": 64, "n_epochs": 4}),
}


def model_on(n_envs: int, form: str, action: str) -> Any:
    algorithm, options = FORMS[form]
    envs = DummyVecEnv([lambda: RandomEnv(OBSERVATION_SPACES["vector"], ACTION_SPACES[action])] * n_envs)
    return in_float64(with_rollout(algorithm("MlpPolicy", envs, n_steps=32, seed=0, device="cpu", **options)))


def worker_of(joint: Any, pair: Pair, rank: int, form: str, action: str) -> Any:
    """A model with the policy of another, and the rollout of one of its two environments."""
    model = model_on(1, form, action)
    model.policy.load_state_dict(joint.policy.state_dict())
    for name, array in vars(joint.rollout_buffer).items():
        if isinstance(array, np.ndarray) and array.shape[:2] == (32, 2):
            setattr(model.rollout_buffer, name, array[:, rank : rank + 1].copy())
    model.reduction = FakeWorker(pair, rank)
    return model


@pytest.mark.parametrize("action", ["box", "discrete", "multibinary"])
@pytest.mark.parametrize("form", FORMS)
def test_two_workers_take_the_update_of_their_samples_together(form: str, action: str) -> None:
    joint, pair = model_on(2, form, action), Pair()
    workers = [worker_of(joint, pair, rank, form, action) for rank in range(2)]
    threads = [threading.Thread(target=model.train) for model in workers]
    for thread in threads:
        thread.start()
    joint.train()
    for thread in threads:
        thread.join(timeout=120)
    record = joint.logger.name_to_value
    for worker in workers:
        for ours, theirs in zip(worker.policy.parameters(), joint.policy.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        for name in (name for name in record if name.startswith("train/")):
            assert worker.logger.name_to_value[name] == pytest.approx(record[name], rel=1e-3, abs=1e-5), name
    for ours, theirs in zip(*(model.policy.parameters() for model in workers), strict=True):
        assert torch.equal(ours, theirs)


# States that begin empty, and arguments that change.


class Counting(ScaledCritic):
    """Its state is empty before the first fit."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() if self.fits else {}

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        if state:
            super().load_state_dict(state)


class Unsaveable(ScaledCritic):
    """Keeps an array of NumPy in its state."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "history": np.zeros(2)}


def test_a_state_that_is_empty_at_first_is_loaded(tmp_path: Path) -> None:
    model = make(TRPO, critic=Counting)
    fresh = model.get_parameters()
    model.learn(64)
    model.save(tmp_path / "model")
    assert TRPO.load(tmp_path / "model").value_critic.fits == 2
    model.set_parameters(fresh)


def test_a_state_that_torch_would_not_load_is_refused_before_anything_is_learnt() -> None:
    model = make(TRPO, critic=Unsaveable)
    before = [param.clone() for param in model.policy.parameters()]
    with pytest.raises(TypeError, match=r"`Unsaveable.state_dict.*must hold.*state\['history'\] is a ndarray"):
        model.learn(32)
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [("critic", "adam"), ("critic_kwargs", {"n_iterations": 5}), ("batch_size", 32), ("critic", "no")],
)
def test_arguments_of_the_critic_may_change(name: str, value: Any) -> None:
    models = [make(TRPO).learn(32) for _ in range(2)]
    setattr(models[1], name, value)
    if value == "no":
        with pytest.raises(ValueError, match=r"`critic` must be one of"):
            models[1].learn(32, reset_num_timesteps=False)
        return
    for model in models:
        model.learn(32, reset_num_timesteps=False)
    assert not torch.equal(models[0].policy.value_net.weight, models[1].policy.value_net.weight)


def test_another_ridge_leaves_a_critic_its_state() -> None:
    model = make(TRPO, critic="scaled").learn(64)
    model.critic_kwargs = {"ridge": 1.0}
    model.learn(32, reset_num_timesteps=False)
    assert model.value_critic.ridge == 1.0 and model.value_critic.fits == 3
