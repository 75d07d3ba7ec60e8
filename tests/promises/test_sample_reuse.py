"""Sample reuse: what the policy step sees of earlier rollouts, and that nothing else changes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from envs import make
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, RecurrentTRPO
from sb3_trpo_ext.core.advantages import trace_advantages
from sb3_trpo_ext.critic.gauss_newton import GaussNewtonCritic
from sb3_trpo_ext.policy.problem import PolicyProblem
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.training.natural_gradient import PolicyStep


class Watched(TRPO):
    """Keeps the batches that its policy steps see, and what was known when they were made."""

    seen: list[Batch]
    collected: list[dict[str, Any]]

    def _policy_step(self, problem: PolicyProblem) -> PolicyStep:
        self.seen.append(problem.batch)
        buffer = self.rollout_buffer
        self.collected.append(
            {
                "rewards": buffer.rewards.copy(),
                "starts": np.concatenate([buffer.episode_starts, self._last_episode_starts[None]]),
                "log_probs": buffer.log_probs.copy(),
                "observations": torch.as_tensor(buffer.observations.copy()),
                "actions": torch.as_tensor(buffer.actions.copy()),
                "following": torch.as_tensor(self._last_obs).clone(),
                "policy": {name: value.clone() for name, value in self.policy.state_dict().items()},
            }
        )
        return super()._policy_step(problem)


def watched(rollouts: int, **options: Any) -> Watched:
    model = make(Watched, action="box", n_steps=32, normalize_advantage=False, **options)
    model.seen, model.collected = [], []
    model.learn(32 * rollouts)
    return model


def test_the_policy_sees_the_last_rollouts_as_it_would_judge_them_now() -> None:
    model = watched(4, sample_reuse=3)
    assert [len(batch) for batch in model.seen] == [32, 64, 96, 96]
    oldest, middle, newest = model.collected[1:]
    model.policy.load_state_dict(newest["policy"])  # as it was at the last policy step
    batch = model.seen[3]
    for place, past in ((1, oldest), (2, middle)):
        part = batch[slice(32 * place, 32 * place + 32)]
        with torch.no_grad():
            values, log_prob, _ = model.policy.evaluate_actions(past["observations"][:, 0], past["actions"][:, 0])
            last = model.policy.predict_values(past["following"])
        np.testing.assert_array_equal(part.old_log_prob, past["log_probs"].flatten())
        expected = trace_advantages(
            torch.as_tensor(past["rewards"]),
            torch.cat([values, last]),
            1 - torch.as_tensor(past["starts"][1:]).float(),
            torch.exp(log_prob - part.old_log_prob)[:, None],
            discount=model.gamma,
            trace_decay=model.gae_lambda,
        )
        torch.testing.assert_close(part.advantages, expected.flatten(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(batch.weights, torch.full((96,), 1 / 96))


def test_the_newest_rollout_is_seen_as_without_reuse() -> None:
    model, plain = watched(1, sample_reuse=3), watched(1)
    for name, expected in plain.seen[0].rows().items():
        assert expected is None or torch.equal(getattr(model.seen[0], name), expected)


@pytest.mark.parametrize("rollouts", [2, 4])
def test_the_radius_is_shared(rollouts: int) -> None:
    model = make(TRPO, action="box", n_steps=64, sample_reuse=rollouts, target_kl=0.05, kl_per_action_dim=False)
    radius = 0.05 * (2 / (rollouts + 1)) ** 2
    assert model.trust_region_radius() == pytest.approx(radius)
    model.learn(64 * 6)
    assert 0 < model.logger.name_to_value["train/kl_divergence_loss"] <= radius


@pytest.mark.parametrize("algorithm", [TRPO, MaskableTRPO])
@pytest.mark.parametrize("observation", ["vector", "discrete", "image", "dict"])
def test_every_observation_can_be_seen_again(algorithm: Any, observation: str) -> None:
    model = make(algorithm, observation=observation, sample_reuse=2, n_steps=16, fisher_chunk_size=5)
    model.learn(64)
    assert model._n_updates >= 4
    assert len(model._past_rollouts) == 1


def test_a_kept_rollout_does_not_change_with_the_next() -> None:
    model = watched(2, sample_reuse=2)
    (kept,) = model._past_rollouts
    before = [torch.as_tensor(x).clone() for x in (kept.batch.observations, kept.rewards, kept.batch.old_log_prob)]
    model.sample_reuse = 3  # so that it stays
    model.learn(64, reset_num_timesteps=False)
    for now, then in zip((kept.batch.observations, kept.rewards, kept.batch.old_log_prob), before, strict=True):
        assert bool((torch.as_tensor(now) == then).all())


def test_an_update_that_is_undone_keeps_no_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    model = watched(1, sample_reuse=2)
    kept = model._past_rollouts

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(GaussNewtonCritic, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.learn(32, reset_num_timesteps=False)
    assert model._past_rollouts is kept


def test_rollouts_are_not_saved(tmp_path: Path) -> None:
    model = watched(3, sample_reuse=3)
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env=model.env)
    assert loaded.sample_reuse == 3 and loaded._past_rollouts == ()
    loaded.learn(64)
    assert len(loaded._past_rollouts) == 2


def test_what_cannot_be_reused_is_refused() -> None:
    class Mine(RolloutBuffer):
        pass

    with pytest.raises(ValueError, match=r"`sample_reuse` must be an integer of at least 1"):
        make(TRPO, sample_reuse=0)
    with pytest.raises(ValueError, match=r"`sample_reuse` must be 1 for a recurrent policy, got 2"):
        make(RecurrentTRPO, sample_reuse=2)
    with pytest.raises(ValueError, match=r"`sample_reuse` needs the arrays of SB3's own rollout buffers"):
        make(TRPO, sample_reuse=2, rollout_buffer_class=Mine)
    with pytest.raises(TypeError, match=r"sample_reuse.*use the class TRPO"):
        make(NPG, sample_reuse=2)


# ``final_n_steps``: rollouts that change their length with the progress of training


class Lengths(BaseCallback):
    """The steps of every rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def _on_rollout_start(self) -> None:
        self.lengths.append(0)

    def _on_step(self) -> bool:
        self.lengths[-1] += 1
        return True


def lengths(model: Any, total: int) -> list[int]:
    callback = Lengths()
    model.learn(total, callback=callback)
    return callback.lengths


@pytest.mark.parametrize(
    ("algorithm", "observation", "fast"),
    [
        (TRPO, "vector", True),
        (TRPO, "vector", False),
        (TRPO, "dict", True),
        (RecurrentTRPO, "vector", True),
        (MaskableTRPO, "vector", True),
    ],
)
@pytest.mark.parametrize("final", [64, 4])
def test_rollouts_go_from_one_length_to_the_other(algorithm: Any, observation: str, fast: bool, final: int) -> None:
    options = {"n_steps": 16, "final_n_steps": final, "fast_rollouts": fast, "critic": "adam"}
    model = make(algorithm, observation=observation, **options)
    seen = lengths(model, 300)
    assert seen[0] == 16 and (seen == sorted(seen)) == (final > 16)
    samples = np.cumsum(seen)
    expected = 16 * (final / 16) ** (np.concatenate([[0], samples[:-1]]) / 300)
    np.testing.assert_array_equal(seen, np.round(expected))
    assert model._n_updates >= len(seen)
    assert model.rollout_buffer.buffer_size == seen[-1]


def test_the_length_does_not_go_beyond_the_last() -> None:
    model = make(TRPO, n_steps=16, final_n_steps=64)
    model.num_timesteps, model._total_timesteps = 130, 100
    assert model.rollout_steps() == 64


def test_a_saved_model_begins_where_it_was_asked_to(tmp_path: Path) -> None:
    model = make(TRPO, n_steps=16, final_n_steps=64)
    model.learn(200)
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env=model.env)
    assert (loaded.n_steps, loaded.final_n_steps) == (16, 64)
    assert lengths(loaded, 100)[0] == 16


def test_without_it_every_rollout_has_n_steps() -> None:
    assert set(lengths(make(TRPO, n_steps=16), 64)) == {16}


@pytest.mark.parametrize("value", [0, -1, 2.5, "many", True])
def test_an_impossible_length_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="`final_n_steps`"):
        make(TRPO, final_n_steps=value)


def test_npg_says_what_to_use() -> None:
    with pytest.raises(TypeError, match=r"final_n_steps.*use the class TRPO"):
        make(NPG, final_n_steps=64)


@pytest.mark.parametrize(("before", "after"), [(3, 1), (3, 2), (2, 3)])
def test_the_number_of_rollouts_may_change(before: int, after: int) -> None:
    model = watched(5, sample_reuse=before)
    model.sample_reuse = after
    model.seen = []
    model.learn(32 * 4, reset_num_timesteps=False)
    assert [len(batch) // 32 for batch in model.seen][-1] == after
    assert max(len(batch) // 32 for batch in model.seen) <= after
    assert len(model._past_rollouts) == after - 1
