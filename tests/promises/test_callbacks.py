from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from envs import ACTION_SPACES, OBSERVATION_SPACES, RandomEnv, make, policy_name, with_rollout
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, PPOClip, PPOPenalty, RecurrentNPG, RecurrentPPOClip, RecurrentTRPO

BOTH = pytest.mark.parametrize("algorithm", [TRPO, PPOClip])
EVERY = pytest.mark.parametrize(
    "algorithm", [TRPO, NPG, PPOClip, PPOPenalty, RecurrentTRPO, RecurrentPPOClip, MaskableTRPO]
)


class Recorder(BaseCallback):
    """Writes down when it is called, and stops at a step."""

    def __init__(self, stop_at: int = 10**9) -> None:
        super().__init__()
        self.stop_at, self.events = stop_at, []

    def _on_training_start(self) -> None:
        self.events.append("training start")

    def _on_rollout_start(self) -> None:
        self.events.append("rollout start")

    def _on_step(self) -> bool:
        clipped = set() if isinstance(self.model, MaskableTRPO) else {"clipped_actions"}
        assert {"infos", "dones", "rewards", "new_obs", "actions", "n_steps"} | clipped <= set(self.locals)
        return self.num_timesteps < self.stop_at

    def _on_rollout_end(self) -> None:
        self.events.append("rollout end")

    def _on_training_end(self) -> None:
        self.events.append("training end")


@EVERY
def test_callbacks_are_called_as_sb3_calls_them(algorithm: Any) -> None:
    recorder = Recorder()
    make(algorithm).learn(64, callback=recorder)
    rollouts = ["rollout start", "rollout end"] * 2
    assert recorder.events == ["training start", *rollouts, "training end"]


@EVERY
def test_a_callback_that_returns_false_stops_training(algorithm: Any) -> None:
    recorder = Recorder(stop_at=40)
    model = make(algorithm).learn(1000, callback=recorder)
    assert model.num_timesteps == 40
    assert recorder.events == ["training start", "rollout start", "rollout end", "rollout start", "training end"]


@BOTH
def test_evaluation_checkpoints_and_stopping(algorithm: Any, tmp_path: Path) -> None:
    evaluate = EvalCallback(
        Monitor(RandomEnv()),
        callback_on_new_best=StopTrainingOnRewardThreshold(-1e9),
        eval_freq=50,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    model = make(algorithm).learn(1000, callback=[evaluate, CheckpointCallback(20, str(tmp_path), name_prefix="c")])
    assert model.num_timesteps == 50
    assert {"best_model.zip", "evaluations.npz", "c_20_steps.zip", "c_40_steps.zip"} <= {
        path.name for path in tmp_path.iterdir()
    }
    algorithm.load(tmp_path / "c_40_steps.zip", env=model.env).learn(32)


@EVERY
def test_the_progress_bar(algorithm: Any) -> None:
    make(algorithm).learn(64, progress_bar=True)


@BOTH
def test_tensorboard_and_csv_hold_the_log(algorithm: Any, tmp_path: Path) -> None:
    model = make(algorithm)
    model.set_logger(configure(str(tmp_path), ["csv", "tensorboard"]))
    model.learn(96)
    table = pd.read_csv(tmp_path / "progress.csv")
    events = EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    keys = {"train/kl_divergence_loss", "train/kl_max", "train/value_loss", "time/rollout_s", "time/policy_s"}
    for key in keys | ({"time/critic_s", "train/target_kl", "train/cg_steps"} if algorithm is TRPO else set()):
        assert key in table
        assert key in events
    assert table["train/kl_divergence_loss"].dropna().gt(0).all()


@BOTH
@pytest.mark.parametrize("wrapper", [VecNormalize, lambda env: VecFrameStack(env, 2), VecMonitor, lambda env: env])
def test_vectorised_environments(algorithm: Any, wrapper: Any) -> None:
    env = wrapper(make_vec_env(RandomEnv, n_envs=3, seed=0))
    algorithm("MlpPolicy", env, n_steps=16, batch_size=16, device="cpu").learn(96)


@BOTH
def test_environments_in_processes_of_their_own(algorithm: Any) -> None:
    env = make_vec_env(RandomEnv, n_envs=2, vec_env_cls=SubprocVecEnv)
    algorithm("MlpPolicy", env, n_steps=16, batch_size=16, device="cpu").learn(64)
    env.close()


# Determinism


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gauss-newton": (TRPO, {"action": "box", "critic": "gauss_newton"}),
    "adam": (TRPO, {"action": "multidiscrete", "critic": "adam", "batch_size": 16}),
    "dict": (TRPO, {"action": "multibinary", "observation": "dict"}),
    "gsde": (TRPO, {"action": "box", "use_sde": True}),
    "chunks": (TRPO, {"action": "discrete", "fisher_chunk_size": 5, "sub_sampling_factor": 2}),
    "gsde-adam": (TRPO, {"action": "box", "use_sde": True, "critic": "adam", "batch_size": 16}),
    "npg": (NPG, {"action": "box"}),
    "ppo": (PPOClip, {"action": "box", "batch_size": 16}),
    "ppo-penalty": (PPOPenalty, {"action": "multidiscrete", "batch_size": 16}),
    "recurrent": (RecurrentTRPO, {"action": "box", "curvature_samples": 10}),
    "recurrent-ppo": (RecurrentPPOClip, {"action": "box", "batch_size": 16}),
    "maskable": (MaskableTRPO, {"action": "multidiscrete"}),
    "ppo-gsde-dict": (PPOClip, {"action": "box", "observation": "dict", "use_sde": True, "batch_size": 16}),
}


def trained(case: str, seed: int) -> list[torch.Tensor]:
    algorithm, options = CASES[case]
    return list(make(algorithm, **{**options, "seed": seed}).learn(64).policy.parameters())


@pytest.mark.parametrize("case", CASES)
def test_the_seed_determines_the_parameters(case: str) -> None:
    first, again, other = trained(case, 3), trained(case, 3), trained(case, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_an_update_draws_nothing_from_torch(case: str) -> None:
    algorithm, options = CASES[case]
    model = with_rollout(make(algorithm, **options))
    before = torch.get_rng_state()
    model.train()
    assert torch.equal(before, torch.get_rng_state())


# The rollout buffer may be in any state: its order is known, its size follows, and what is not full is not learnt


ARMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "trpo": (TRPO, {}),
    "adam": (TRPO, {"critic": "adam", "batch_size": 16}),
    "reuse": (TRPO, {"sample_reuse": 3}),
    "critic of two": (TRPO, {"critic": "adam", "batch_size": 16, "critic_kwargs": {"n_rollouts": 2}}),
    "npg": (NPG, {}),
    "ppo": (PPOClip, {"batch_size": 16, "n_epochs": 2}),
    "ppo-penalty": (PPOPenalty, {"batch_size": 16, "n_epochs": 2}),
    "recurrent": (RecurrentTRPO, {}),
    "recurrent npg": (RecurrentNPG, {}),
    "recurrent ppo": (RecurrentPPOClip, {"batch_size": 16, "n_epochs": 2}),
    "maskable": (MaskableTRPO, {"sample_reuse": 2}),
}


def several(arm: str, n_envs: int = 3, observation: str = "vector", **options: Any) -> Any:
    """A model of several environments whose episodes have different lengths."""
    algorithm, arguments = ARMS[arm]
    action = ACTION_SPACES["discrete" if algorithm is MaskableTRPO else "box"]
    space = OBSERVATION_SPACES[observation]
    env = DummyVecEnv(
        [lambda length=length: RandomEnv(space, action, episode_length=length) for length in (5, 8, 11)[:n_envs]]
    )
    arguments = {"n_steps": 16, "device": "cpu", "seed": 0, **arguments, **options}
    if issubclass(algorithm, RecurrentPPO):
        arguments["policy_kwargs"] = {"lstm_hidden_size": 6, "n_lstm_layers": 3}
    return algorithm(policy_name(algorithm, observation), env, **arguments)


class Looks(BaseCallback):
    """Asks the buffer for minibatches at the end of a rollout, and leaves NumPy's generator as it was."""

    def __init__(self, batch_size: int | None, batches: int | None) -> None:
        super().__init__()
        self.batch_size, self.batches = batch_size, batches

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        state = np.random.get_state()
        samples = self.model.rollout_buffer.get(self.batch_size)
        for _ in range(1000 if self.batches is None else self.batches):
            next(samples, None)
        np.random.set_state(state)
        assert self.model.rollout_buffer.generator_ready


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(
    ("observation", "batch_size", "batches"), [("vector", None, None), ("vector", 7, 2), ("dict", 7, 2)]
)
def test_a_callback_that_looks_at_the_buffer_changes_nothing(
    arm: str, observation: str, batch_size: int | None, batches: int | None
) -> None:
    models = [several(arm, observation=observation, fast_rollouts="exact") for _ in range(2)]
    for model, callback in zip(models, (None, Looks(batch_size, batches)), strict=True):
        model.set_random_seed(0)
        model.learn(3 * 48, callback=callback)
    plain, looked = models
    for one, other in zip(plain.policy.parameters(), looked.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    for key, value in plain.logger.name_to_value.items():
        if key.startswith("train/"):
            np.testing.assert_equal(looked.logger.name_to_value[key], value, err_msg=key)
    for one, other in zip(getattr(plain, "_past_rollouts", ()), getattr(looked, "_past_rollouts", ()), strict=True):
        np.testing.assert_array_equal(one.rewards, other.rewards)
        np.testing.assert_array_equal(one.batch.old_log_prob, other.batch.old_log_prob)


class Spoils(Looks):
    """Looks, and puts NaN where the environment might have put it, in step 4 of environment 2."""

    def _on_rollout_end(self) -> None:
        self.model.rollout_buffer.advantages[4, 2] = np.nan
        super()._on_rollout_end()


@pytest.mark.parametrize("arm", ARMS)
def test_a_place_is_named_rightly_in_a_buffer_that_was_looked_at(arm: str) -> None:
    with pytest.raises(ValueError, match=r"advantage.*environment 2 at step 4\."):
        several(arm).learn(48, callback=Spoils(None, 1))


class Forbids(Looks):
    """Looks, after it has forbidden every action in step 4 of environment 2."""

    def _on_rollout_end(self) -> None:
        self.model.rollout_buffer.action_masks[4, 2] = 0
        super()._on_rollout_end()


def test_a_state_without_actions_is_named_rightly_in_a_buffer_that_was_looked_at() -> None:
    with pytest.raises(ValueError, match=r"environment 2 allow no option of choice 0 at step 4 "):
        several("maskable").learn(48, callback=Forbids(7, 1))


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(("observation", "n_steps"), [("vector", 5), ("vector", 40), ("dict", 20)])
def test_the_buffer_follows_n_steps(arm: str, observation: str, n_steps: int) -> None:
    model = several(arm, observation=observation).learn(48)
    model.n_steps = n_steps
    model.learn(n_steps * 3 * 2, reset_num_timesteps=False)
    buffer = model.rollout_buffer
    assert buffer.full and len(buffer.rewards) == buffer.buffer_size == n_steps
    assert np.all(buffer.values != 0), "rows that were never filled"
    assert model.num_timesteps == 48 + n_steps * 3 * 2


@pytest.mark.parametrize("arm", ["trpo", "npg", "ppo", "ppo-penalty", "recurrent ppo", "maskable"])
@pytest.mark.parametrize("value", [0, -3, 2.5, "many", True])
def test_an_impossible_n_steps_is_refused_at_construction_and_afterwards(arm: str, value: Any) -> None:
    model = several(arm).learn(48)
    before = [param.detach().clone() for param in model.policy.parameters()]
    model.n_steps = value
    for _ in range(2):
        with pytest.raises(ValueError, match=f"`n_steps` must be an integer of at least 1, got {value!r}"):
            model.learn(48)
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    with pytest.raises(ValueError, match="`n_steps`"):
        several(arm, n_steps=value)


def test_what_construction_checks_of_n_steps_is_checked_again() -> None:
    model = make(PPOClip, batch_size=16)
    model.n_steps = 24
    with pytest.warns(UserWarning, match="batch"):
        model.learn(24)
    model = make(TRPO)
    model.n_steps = 1
    for _ in range(2):
        with pytest.raises(AssertionError, match="n_steps=1 and n_envs=1"):
            model.learn(4)


class Grows(BaseCallback):
    """Changes ``n_steps`` from rollout to rollout."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.model.n_steps += 3


@pytest.mark.parametrize("arm", ARMS)
def test_a_callback_may_change_n_steps(arm: str) -> None:
    model = several(arm).learn((16 + 19 + 22) * 3, callback=Grows())
    assert model.rollout_buffer.buffer_size == 22 and model.num_timesteps == (16 + 19 + 22) * 3


class Fixed(RolloutBuffer):
    """A user's buffer that makes its arrays once."""

    def reset(self) -> None:
        if not hasattr(self, "rewards"):
            super().reset()
        self.pos, self.full, self.generator_ready = 0, False, False


class Following(RolloutBuffer):
    """A user's buffer that makes them as SB3's does."""


def test_a_buffer_of_another_class_follows_or_says_that_it_does_not() -> None:
    model = make(PPOClip, batch_size=16, rollout_buffer_class=Following).learn(32)
    model.n_steps = 48
    model.learn(48)
    assert len(model.rollout_buffer.rewards) == 48
    model = make(TRPO, rollout_buffer_class=Fixed).learn(32)
    model.n_steps = 48
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Fixed was made for 32 steps of 1 environments.*`n_steps`, now 48"):
            model.learn(48)


def test_a_replaced_buffer_is_made_to_fit() -> None:
    model = several("trpo")
    space = model.observation_space, model.action_space
    model.rollout_buffer = RolloutBuffer(7, *space, device="cpu", n_envs=1, gamma=0.9, gae_lambda=0.8)
    model.learn(96)
    assert model.rollout_buffer.rewards.shape == (16, 3) and model.rollout_buffer.gamma == 0.9


class Stops(BaseCallback):
    """Ends the training within a rollout."""

    def _on_step(self) -> bool:
        return self.n_calls < 5


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("state", ["new", "reset", "stopped", "another environment"])
def test_an_update_on_a_buffer_that_is_not_full_is_impossible(arm: str, state: str) -> None:
    model = several(arm)
    if state == "reset":
        with_rollout(model).rollout_buffer.reset()
    elif state == "stopped":
        model.learn(48, callback=Stops())
    elif state == "another environment":
        with_rollout(model).set_env(several(arm).env)
    before = [param.detach().clone() for param in model.policy.parameters()]
    held = 4 if state == "stopped" else 0
    with pytest.raises(RuntimeError, match=rf"rollout buffer holds {held} of 16 steps.*rollout_buffer\.full"):
        model.train()
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    model.learn(48)


@pytest.mark.parametrize("arm", ["trpo", "recurrent", "ppo", "maskable"])
def test_a_loaded_model_may_have_another_number_of_environments(arm: str, tmp_path: Path) -> None:
    several(arm).learn(48).save(tmp_path / "model")
    loaded = ARMS[arm][0].load(tmp_path / "model", env=several(arm, n_envs=2).env, device="cpu").learn(32)
    assert loaded.rollout_buffer.rewards.shape == (16, 2)
    if arm == "recurrent":
        assert loaded._last_lstm_states.pi[0].shape[1] == 2
