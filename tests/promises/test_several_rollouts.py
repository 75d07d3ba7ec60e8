"""Critics fitted on several rollouts: what they see of earlier ones, and that nothing else changes."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from envs import make, v_trace, with_rollout
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_trpo_ext import NPG, TRPO, Critic, MaskableTRPO, RecurrentNPG, RecurrentTRPO
from sb3_trpo_ext.critic.adam import AdamCritic
from sb3_trpo_ext.critic.base import Regression
from sb3_trpo_ext.critic.gauss_newton import GaussNewtonCritic
from sb3_trpo_ext.rollout.action_values import of_taken
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.rollout.buffers import minibatches, whole_rollout

KINDS: dict[str, dict[str, Any]] = {
    "gauss_newton": {"critic": "gauss_newton"},
    "adam": {"critic": "adam", "batch_size": 16, "n_critic_updates": 2},
}
Q: dict[str, Any] = {"critic": "action_value"}


class Watched(GaussNewtonCritic):
    """Keeps what it was asked to fit, with the policy as it was then."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seen: list[Batch] = []
        self.policies: list[dict[str, torch.Tensor]] = []

    def fit(self, regression: Regression) -> float:
        self.seen.append(regression.batch)
        state = regression.policy.state_dict()
        self.policies.append({name: value.clone() for name, value in state.items()})
        return super().fit(regression)


class Collected(BaseCallback):
    """Copies what every rollout left in the buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.rollouts: list[dict[str, torch.Tensor]] = []

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        names = ("rewards", "values", "advantages", "returns", "log_probs", "observations", "actions")
        found = {name: torch.as_tensor(getattr(buffer, name).copy()) for name in names}
        if hasattr(buffer, "action_masks"):
            found["masks"] = torch.as_tensor(buffer.action_masks.copy())
        self.rollouts.append(found | {"episode_starts": torch.as_tensor(buffer.episode_starts.copy())})

    def _on_step(self) -> bool:
        return True


def watched(rollouts: int, n_rollouts: int, algorithm: Any = TRPO, action: str = "box", **options: Any) -> Any:
    """A model after some updates, whose critic has kept what it saw; and what was collected."""
    kwargs = {"n_rollouts": n_rollouts}
    options = {"critic": Watched, "critic_kwargs": kwargs, "n_steps": 32, "target_kl": 0.2, **options}
    model, collected = make(algorithm, action, **options), Collected()
    model.learn(32 * rollouts, callback=collected)
    return model, collected.rollouts


def starts_after(rollouts: list[dict[str, torch.Tensor]], index: int) -> torch.Tensor:
    """Whether an episode begins with the step after each: episodes of `RandomEnv` are ten steps long."""
    following = rollouts[index + 1]["episode_starts"][:1] if index + 1 < len(rollouts) else None
    assert following is not None
    return torch.cat([rollouts[index]["episode_starts"][1:], following])


def test_earlier_rollouts_have_v_trace_targets_for_the_policy_as_it_is() -> None:
    model, rollouts = watched(5, 3)
    critic = model.value_critic
    assert [len(batch) for batch in critic.seen] == [32, 64, 96, 96, 96]
    model.policy.load_state_dict(critic.policies[4])  # as it was at the last fit
    policy, batch, off_policy = model.policy.double(), critic.seen[4], 0.0
    policy.features_extractor.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    for place, index in ((1, 2), (2, 3)):
        past, part = rollouts[index], batch[slice(32 * place, 32 * place + 32)]
        following = rollouts[index + 1]["observations"][0]
        with torch.no_grad():
            values, log_prob, _ = policy.evaluate_actions(past["observations"][:, 0], past["actions"][:, 0].double())
            last = policy.predict_values(following)
        ratios = torch.exp(log_prob[:, None] - past["log_probs"].double())
        off_policy = max(off_policy, float((ratios - 1).abs().max()))
        expected = v_trace(
            past["rewards"].double(),
            torch.cat([values, last]),
            1 - starts_after(rollouts, index).double(),
            ratios,
            discount=model.gamma,
            decay=model.gae_lambda,
        )
        torch.testing.assert_close(part.returns, expected.flatten().float(), rtol=1e-4, atol=1e-4)
    assert off_policy > 0.1  # or there was nothing to correct
    torch.testing.assert_close(batch.weights, torch.full((96,), 1 / 96))


@pytest.mark.parametrize("action", ["box", "discrete"])
def test_the_newest_rollout_keeps_its_returns(action: str) -> None:
    model, rollouts = watched(4, 3, action=action)
    for batch, collected in zip(model.value_critic.seen, rollouts, strict=True):
        assert torch.equal(batch.returns[:32], collected["returns"].flatten())


@pytest.mark.parametrize("options", [{}, Q, {**Q, "bootstrap": "max"}], ids=["V", "Q expected", "Q max"])
@pytest.mark.parametrize("algorithm", [TRPO, MaskableTRPO])
def test_with_the_policy_unchanged_the_targets_are_the_returns(algorithm: Any, options: dict[str, Any]) -> None:
    model = with_rollout(make(algorithm, **options))
    batch = whole_rollout(model.rollout_buffer, model.action_space)
    past = model._trajectories(batch)
    seen = past.seen_by(
        model.policy,
        discount=model.gamma,
        trace_decay=model.gae_lambda,
        chunk_size=7,
        bootstrap=model.bootstrap,
    )
    torch.testing.assert_close(seen.returns, batch.returns, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bootstrap", ["expected", "max"])
def test_action_values_have_the_targets_of_what_followed(bootstrap: str) -> None:
    """By their recursion: G_t = r + γ ((1 - c) B(s') + c G_{t+1}), c = λ min(1, π/μ) of the action at s'."""
    arguments = {"fit": Watched, "n_rollouts": 2}
    options = {**Q, "critic_kwargs": arguments, "bootstrap": bootstrap, "gamma": 0.9}
    model, rollouts = watched(3, 2, action="discrete", **options)
    model.policy.load_state_dict(model.value_critic.policies[2])
    policy, past = model.policy, rollouts[1]
    observations = torch.cat([past["observations"][:, 0], rollouts[2]["observations"][0]])
    with torch.no_grad():
        action_values, masses = policy.action_values(observations), policy.probabilities(observations)
        mixed = (masses * action_values).sum(dim=1)
        bootstraps = mixed if bootstrap == "expected" else action_values.amax(dim=1)
        log_prob = of_taken(masses[:-1], past["actions"].flatten()).log()
    ratios = torch.exp(log_prob - past["log_probs"].flatten())
    continues = 1 - starts_after(rollouts, 1).flatten()
    ahead, targets = bootstraps[-1], torch.empty(32)
    for t in reversed(range(32)):
        if t + 1 < 32:
            c = model.gae_lambda * float(ratios[t + 1].clamp(max=1.0))
            ahead = (1 - c) * bootstraps[t + 1] + c * targets[t + 1]
        targets[t] = past["rewards"].flatten()[t] + model.gamma * continues[t] * ahead
    torch.testing.assert_close(model.value_critic.seen[2].returns[32:], targets, rtol=1e-4, atol=1e-4)
    assert float((ratios - 1).abs().max()) > 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fast_updates", [True, False])
def test_one_rollout_is_the_critic_of_before(kind: str, fast_updates: bool) -> None:
    ends = []
    for kwargs in ({}, {"critic_kwargs": {"n_rollouts": 1}}):
        model = make(TRPO, "box", **KINDS[kind], **kwargs, fast_updates=fast_updates).learn(160)
        assert model._past_rollouts == () and model._theta_left is None
        ends.append([param.detach() for param in model.policy.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand_and_by_autograd_an_update_is_the_same(kind: str) -> None:
    kwargs = {"n_rollouts": 3}
    if kind == "gauss_newton":  # few products, well conditioned: conjugate gradients multiply last bits
        kwargs |= {"cg_steps": 2, "damping": 1.0}
    model = with_rollout(make(NPG, "box", **KINDS[kind], critic_kwargs=kwargs).learn(96))
    start = {name: value.clone() for name, value in model.policy.state_dict().items()}
    optimizer = deepcopy(model.policy.optimizer.state_dict())
    past, left, ends = model._past_rollouts, model._theta_left, []
    assert len(past) == 2
    for fast in (True, False):
        model.policy.load_state_dict(start)
        model.policy.optimizer.load_state_dict(deepcopy(optimizer))
        model._past_rollouts, model._theta_left, model.fast_updates = past, left, fast
        np.random.seed(0)
        model.train()
        assert model.update_path.startswith("fast" if fast else "autograd")
        assert len(model._past_rollouts) == 2 and model._past_rollouts[0] is past[1]
        ends.append(torch.cat([param.detach().flatten() for param in model.policy.parameters()]))
    before = torch.cat([start[name].flatten() for name, _ in model.policy.named_parameters()])
    assert float((ends[0] - before).norm()) > 1e-2
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_a_fit_on_several_rollouts_lowers_their_error() -> None:
    model, _ = watched(4, 4)
    batch = model.value_critic.seen[-1]
    model.policy.load_state_dict(model.value_critic.policies[-1])

    def error() -> float:
        with torch.no_grad():
            return float((batch.values(model.policy) - batch.returns).square().mean())

    before = error()
    after = model.value_critic.fit(Regression(model.policy, batch, model._actor(batch)))
    assert after == pytest.approx(error(), rel=1e-4)
    assert len(batch) == 128 and after < before
    assert model.logger.name_to_value["train/value_loss"] == pytest.approx(after, rel=1e-3)


def test_an_epoch_of_adam_sees_every_sample_of_all_rollouts_once() -> None:
    seen: list[int] = []

    class Counted(AdamCritic):
        def fit(self, regression: Regression) -> float:
            marked = regression.batch.returns.clone()
            for part in regression.minibatches(regression.batch):
                seen.append(len(part))
                marked = marked[~torch.isin(marked, part.returns)]
            assert len(marked) == 0 and sum(seen) == len(regression.batch)
            seen.clear()
            return super().fit(regression)

    options = {"critic": Counted, "critic_kwargs": {"n_rollouts": 3}, "batch_size": 16}
    model = make(TRPO, "box", **options).learn(128)
    assert len(model._past_rollouts) == 2


def test_minibatches_of_the_rollout_alone_are_those_of_before() -> None:
    model = with_rollout(make(TRPO, "box"))
    batch, size = whole_rollout(model.rollout_buffer, model.action_space), 16
    np.random.seed(0)
    ours = [part.returns for part in minibatches(model.rollout_buffer, batch, size, model.action_space)]
    np.random.seed(0)
    theirs = [data.returns for data in model.rollout_buffer.get(size)]
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", [TRPO, NPG, MaskableTRPO])
@pytest.mark.parametrize("observation", ["vector", "discrete", "image", "dict"])
def test_every_observation_can_be_seen_again(kind: str, algorithm: Any, observation: str) -> None:
    options = {**KINDS[kind], "critic_kwargs": {"n_rollouts": 3}, "n_steps": 16, "fisher_chunk_size": 5}
    model = make(algorithm, observation=observation, **options).learn(64)
    assert model._n_updates >= 4 and len(model._past_rollouts) == 2
    assert np.isfinite(model.logger.name_to_value["train/value_loss"])


@pytest.mark.parametrize("action", ["box", "box2d", "discrete", "multidiscrete", "multibinary"])
def test_every_action_can_be_seen_again(action: str) -> None:
    model = make(TRPO, action, critic_kwargs={"n_rollouts": 2}, use_sde=action == "box").learn(96)
    assert len(model._past_rollouts) == 1


@pytest.mark.parametrize("fit", ["gauss_newton", "adam"])
@pytest.mark.parametrize("options", [{}, {"bootstrap": "max", "surrogate": "expected"}])
@pytest.mark.parametrize("algorithm", [TRPO, MaskableTRPO])
def test_action_values_of_several_rollouts(fit: str, options: dict[str, Any], algorithm: Any) -> None:
    kwargs = {"fit": fit, "n_rollouts": 3}
    model = make(algorithm, **Q, critic_kwargs=kwargs, batch_size=16, **options).learn(128)
    assert len(model._past_rollouts) == 2 and model.value_critic.n_rollouts == 3


@pytest.mark.parametrize(("reuse", "rollouts"), [(3, 2), (2, 4)])
def test_the_policy_sees_as_many_rollouts_as_it_reuses(
    reuse: int, rollouts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, step = [], TRPO._policy_step

    def noted(self: TRPO, problem: Any) -> Any:
        sizes.append(len(problem.batch))
        return step(self, problem)

    monkeypatch.setattr(TRPO, "_policy_step", noted)
    model, _ = watched(5, rollouts, sample_reuse=reuse)
    assert max(sizes) == 32 * reuse
    assert max(map(len, model.value_critic.seen)) == 32 * rollouts
    assert len(model._past_rollouts) == max(reuse, rollouts) - 1


def test_the_number_may_change_on_the_way() -> None:
    model, _ = watched(4, 3)
    for rollouts, sizes in ((1, [32]), (2, [32, 64, 64])):
        model.critic_kwargs = {"n_rollouts": rollouts}
        model.learn(32 * len(sizes), reset_num_timesteps=False)
        assert [len(batch) for batch in model.value_critic.seen] == sizes
        assert len(model._past_rollouts) == rollouts - 1


@pytest.mark.parametrize("kind", [GaussNewtonCritic, AdamCritic])
def test_an_update_that_is_undone_keeps_no_rollout(kind: type[Critic], monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"critic": kind, "critic_kwargs": {"n_rollouts": 2}, "batch_size": 16}
    model = make(NPG, "box", **options).learn(64)
    kept, left = model._past_rollouts, model._theta_left
    fit, steps = kind.fit, []

    def interrupted(self: Any, regression: Regression) -> float:
        steps.append(fit(self, regression))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kind, "fit", interrupted)
        model.learn(32, reset_num_timesteps=False)
    assert steps and model._past_rollouts is kept and model._theta_left is left
    with monkeypatch.context() as patch:  # rejected after all of it was done: the kept ones are put back
        patch.setattr(kind, "fit", lambda self, regression: float("nan"))
        model.learn(32, reset_num_timesteps=False)
    assert model._past_rollouts is kept and model._theta_left is left
    model.learn(32, reset_num_timesteps=False)
    assert len(model._past_rollouts) == 1 and model._past_rollouts is not kept


def test_parameters_that_a_callback_changes_leave_no_rollout_behind() -> None:
    def nudge(scope: dict[str, Any], _: Any) -> bool:
        with torch.no_grad():
            next(scope["self"].policy.parameters()).add_(1e-6)
        return True

    model, _ = watched(3, 3)
    model.learn(96, callback=nudge, reset_num_timesteps=False)
    assert [len(batch) for batch in model.value_critic.seen] == [32, 64, 96, 32, 32, 32]


@pytest.mark.parametrize("algorithm", [TRPO, NPG])
def test_rollouts_are_not_saved(algorithm: Any, tmp_path: Path) -> None:
    model = make(algorithm, critic_kwargs={"n_rollouts": 3}).learn(96)
    model.save(tmp_path / "model")
    data, _, _ = load_from_zip_file(tmp_path / "model")
    assert data is not None and "_past_rollouts" not in data and "_theta_left" not in data
    loaded = algorithm.load(tmp_path / "model", env=model.env)
    assert loaded.value_critic.n_rollouts == 3 and loaded._past_rollouts == () and loaded._theta_left is None
    loaded.learn(64)
    assert len(loaded._past_rollouts) == 2


def test_what_cannot_be_is_refused() -> None:
    class Mine(RolloutBuffer):
        pass

    class Wrong(GaussNewtonCritic):
        n_rollouts = 2.5  # type: ignore[assignment]

        def __init__(self) -> None:
            pass

    for critic in ("gauss_newton", "adam"):
        kwargs = {"n_rollouts": 4}
        for wrong in (0, 1.5, True, "many"):
            with pytest.raises(ValueError, match=r"`critic_kwargs\['n_rollouts'\]` must be an integer of at least 1"):
                make(TRPO, critic=critic, critic_kwargs={"n_rollouts": wrong})
        for algorithm in (RecurrentTRPO, RecurrentNPG):
            with pytest.raises(ValueError, match=r"`critic_kwargs\['n_rollouts'\]` must be 1 for a recurrent.*got 4"):
                make(algorithm, critic=critic, critic_kwargs=kwargs)
        with pytest.raises(ValueError, match=r"`critic_kwargs\['n_rollouts'\]` needs the arrays of SB3's own rollout"):
            make(TRPO, critic=critic, critic_kwargs=kwargs, rollout_buffer_class=Mine)
    with pytest.raises(
        ValueError, match=r"`critic_kwargs` must be arguments of AdamCritic, got \{'damping': 1\}.*use `le"
    ):
        make(TRPO, critic="adam", critic_kwargs={"damping": 1})
    with pytest.raises(ValueError, match=r"`critic_kwargs` must be arguments of SemiGradientCritic"):
        make(TRPO, critic="semi_gradient", critic_kwargs={"n_rollouts": 2})
    with pytest.raises(ValueError, match=r"n_rollouts'\]` must be an integer of at least 1, got 2.5"):
        make(TRPO, critic=Wrong)


def test_what_cannot_be_is_refused_on_the_way_too() -> None:
    model = make(RecurrentTRPO).learn(32)
    model.critic_kwargs = {"n_rollouts": 2}
    with pytest.raises(ValueError, match=r"must be 1 for a recurrent policy, got 2"):
        model.learn(32)
