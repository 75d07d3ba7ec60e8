"""The fast path collects what SB3's own collection would."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, OBSERVATION_SPACES, RandomEnv, make
from gymnasium.wrappers import TimeLimit
from scipy import stats
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecNormalize
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn

from sb3_trpo_ext import TRPO, PPOClip
from sb3_trpo_ext.sb3.rollout import estimate_advantages
from sb3_trpo_ext.sb3.stepping import cheap_copies

FIELDS = ("observations", "actions", "rewards", "episode_starts", "values", "log_probs", "advantages", "returns")
COVERED = ["vector", "discrete", "multidiscrete", "multibinary"]


class Recorder(BaseCallback):
    """Keeps what the callback contract shows at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def _on_step(self) -> bool:
        found = self.locals
        self.seen.append((found["n_steps"], self.num_timesteps, *(np.array(found[n]) for n in ("rewards", "dones"))))
        assert found["obs_tensor"].shape[0] == found["env"].num_envs
        return True


def collected(
    action: str, observation: str, n_envs: int, normalize: bool, forced: np.ndarray | None, **options: Any
) -> tuple[Any, Recorder]:
    """A rollout with timeouts and terminations; by SB3's path with ``forced`` actions if they are given."""

    def env() -> gym.Env:
        return TimeLimit(RandomEnv(OBSERVATION_SPACES[observation], ACTION_SPACES[action], episode_length=9), 6)

    venv = make_vec_env(env, n_envs=n_envs, seed=0)
    venv = VecNormalize(venv, norm_obs=observation == "vector") if normalize else venv
    model = TRPO(
        "MlpPolicy", venv, n_steps=20, seed=0, device="cpu", fast_rollouts=forced is None, policy_kwargs=options
    )
    with torch.no_grad():
        for param in model.policy.parameters():
            param.add_(0.3 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1)))
    if forced is not None:
        steps = iter(forced)

        def forward(obs: Any, deterministic: bool = False) -> Any:
            actions = torch.as_tensor(next(steps))
            flat = actions.flatten() if action == "discrete" else actions.float()
            values, log_prob, _ = model.policy.evaluate_actions(obs, flat)
            return flat.reshape(-1, *model.action_space.shape), values, log_prob

        model.policy.forward = forward
    model.train = lambda: None
    recorder = Recorder()
    model.learn(20 * n_envs, callback=recorder)
    assert model.rollout_path == ("fast" if forced is None else "stable_baselines3: fast_rollouts=False")
    return model, recorder


def check_same_rollout(action: str, observation: str, n_envs: int, normalize: bool = False, **options: Any) -> None:
    fast, fast_seen = collected(action, observation, n_envs, normalize, None, **options)
    plain, plain_seen = collected(action, observation, n_envs, normalize, fast.rollout_buffer.actions, **options)
    for field in FIELDS:
        ours, theirs = getattr(fast.rollout_buffer, field), getattr(plain.rollout_buffer, field)
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5, err_msg=field)
    assert fast.rollout_buffer.full
    assert (fast.num_timesteps, len(fast.ep_info_buffer)) == (plain.num_timesteps, len(plain.ep_info_buffer))
    for mine, peer in zip(fast.ep_info_buffer, plain.ep_info_buffer, strict=True):
        assert (mine["r"], mine["l"]) == (peer["r"], peer["l"])
    np.testing.assert_array_equal(fast._last_obs, plain._last_obs)
    np.testing.assert_array_equal(fast._last_episode_starts, plain._last_episode_starts)
    for mine, peer in zip(fast_seen.seen, plain_seen.seen, strict=True):
        for a, b in zip(mine, peer, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("n_envs", [1, 4])
@pytest.mark.parametrize("observation", COVERED)
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_every_covered_space(action: str, observation: str, n_envs: int) -> None:
    check_same_rollout(action, observation, n_envs)


@pytest.mark.parametrize("action", ACTION_SPACES)
def test_with_normalisation(action: str) -> None:
    check_same_rollout(action, "vector", 4, normalize=True)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Sigmoid, nn.SiLU, nn.ELU, nn.LeakyReLU])
@pytest.mark.parametrize("net_arch", [[], [7], {"pi": [5, 4], "vf": []}], ids=str)
def test_every_activation_and_shape(activation: type[nn.Module], net_arch: Any) -> None:
    check_same_rollout("box", "vector", 2, activation_fn=activation, net_arch=net_arch, share_features_extractor=False)


def many_actions(action: str) -> tuple[Any, np.ndarray]:
    """4000 actions at one and the same observation, by the fast path."""

    class Still(RandomEnv):
        def reset(self, **kwargs: Any) -> Any:
            return np.full(5, 0.5, np.float32), super().reset(**kwargs)[1]

        def step(self, action: Any) -> Any:
            return np.full(5, 0.5, np.float32), *super().step(action)[1:]

    model = TRPO("MlpPolicy", Still(action_space=ACTION_SPACES[action]), n_steps=4000, seed=0, device="cpu")
    with torch.no_grad():
        model.policy.action_net.bias.copy_(torch.linspace(-0.7, 0.8, len(model.policy.action_net.bias)))
        if action == "box":
            model.policy.log_std.copy_(torch.tensor([-0.5, 0.0, 0.3]))
    model.train = lambda: None
    model.learn(4000)
    assert model.rollout_path == "fast"
    distribution = model.policy.get_distribution(torch.full((1, 5), 0.5)).distribution
    return distribution, model.rollout_buffer.actions[:, 0]


def test_gaussian_actions_have_the_policys_distribution() -> None:
    normal, actions = many_actions("box")
    for dimension in range(3):
        mean, std = float(normal.loc[0, dimension].detach()), float(normal.scale[0, dimension].detach())
        assert stats.kstest(actions[:, dimension], stats.norm(mean, std).cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef(actions.T) - np.eye(3)).max() < 0.06
    assert abs(np.corrcoef(actions[:-1, 0], actions[1:, 0])[0, 1]) < 0.06


@pytest.mark.parametrize("action", ["discrete", "multidiscrete", "multibinary"])
def test_discrete_actions_have_the_policys_frequencies(action: str) -> None:
    distribution, actions = many_actions(action)
    if action == "multibinary":
        heads = distribution.probs[0].detach().numpy()
        expected = [np.array([1 - p, p]) for p in heads]
    else:
        choices = distribution if isinstance(distribution, list) else [distribution]
        expected = [choice.probs[0].detach().numpy() for choice in choices]
    for column, probabilities in zip(actions.T, expected, strict=True):
        counts = np.bincount(column.astype(int), minlength=len(probabilities))
        assert (
            stats.chisquare(counts, 4000 * probabilities.astype(float) / probabilities.sum(dtype=float)).pvalue > 1e-3
        )


def hooked(model: Any) -> None:
    model.policy.action_net.register_forward_hook(lambda module, inputs, output: output + 1)


def replaced(model: Any) -> None:
    model.policy.mlp_extractor.forward_actor = lambda features: torch.zeros(len(features), 64)


def wrapped(model: Any) -> None:
    model.policy.mlp_extractor = torch.compile(model.policy.mlp_extractor, backend="eager")


def double(model: Any) -> None:
    model.policy.action_net = nn.Sequential(model.policy.action_net, nn.Tanh())


def parametrised(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.policy.action_net)


def method(name: str) -> Callable[[Any], None]:
    return lambda model: setattr(model.policy, name, getattr(model.policy, name))


@pytest.mark.parametrize(
    "change",
    [hooked, replaced, wrapped, double, parametrised, method("forward"), method("_get_action_dist_from_latent")],
)
def test_a_policy_that_was_changed_falls_back(change: Callable[[Any], None]) -> None:
    model = make(TRPO, "box")
    change(model)
    model.train = lambda: None
    model.learn(32)
    assert model.rollout_path.startswith("stable_baselines3: ")


class OwnForward(ActorCriticPolicy):
    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        return super().forward(obs, deterministic)


class OwnBuffer(RolloutBuffer):
    pass


@pytest.mark.parametrize(
    "options",
    [
        {"use_sde": True},
        {"observation": "image"},
        {"observation": "dict"},
        {"policy_kwargs": {"activation_fn": nn.Softplus}},
        {"rollout_buffer_class": OwnBuffer},
        {"fast_rollouts": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("algorithm", [TRPO, PPOClip])
def test_what_is_not_covered_falls_back(algorithm: Any, options: dict[str, Any]) -> None:
    assert make(algorithm, "box", **options).learn(32).rollout_path.startswith("stable_baselines3: ")


def test_a_subclass_with_its_own_forward_falls_back() -> None:
    model = TRPO(OwnForward, RandomEnv(), n_steps=32, device="cpu").learn(32)
    assert model.rollout_path == "stable_baselines3: OwnForward has its own forward"


def test_verbose_says_which_path_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    make(TRPO, "box", verbose=1).learn(64)
    make(TRPO, "box", verbose=1, use_sde=True).learn(64)
    printed = capsys.readouterr().out
    assert printed.count("Rollouts: fast") == 1
    assert "has its own" not in printed
    assert printed.count("Rollouts: stable_baselines3: action distribution StateDependentNoiseDistribution") == 1


class Saboteur(BaseCallback):
    """Changes the policy in place in the middle of a rollout."""

    def _on_step(self) -> bool:
        if self.n_calls == 10:
            policy = self.model.policy
            self.before = {name: value.clone() for name, value in policy.state_dict().items()}
            with torch.no_grad():
                for param in policy.parameters():
                    param.add_(0.5)
        return True


def test_a_policy_changed_by_a_callback_is_noticed() -> None:
    model, callback = make(TRPO, "box"), Saboteur()
    model.train = lambda: None
    model.learn(32, callback=callback)
    buffer = model.rollout_buffer
    observations, actions = (torch.as_tensor(array[:, 0]) for array in (buffer.observations, buffer.actions))
    for part, parameters in ((slice(10, None), model.policy.state_dict()), (slice(0, 10), callback.before)):
        model.policy.load_state_dict(parameters)
        values, log_probs, _ = model.policy.evaluate_actions(observations[part], actions[part])
        np.testing.assert_allclose(buffer.values[part], values.detach(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(buffer.log_probs[part, 0], log_probs.detach(), rtol=1e-4, atol=1e-5)


def test_a_callback_that_stops_leaves_the_steps_so_far() -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 7

    model = make(TRPO, "box").learn(64, callback=Stop())
    assert (model.num_timesteps, model.rollout_buffer.pos, model._n_updates) == (7, 6, 0)


@pytest.mark.parametrize("n_envs", [1, 4])
def test_advantages_are_those_of_sb3_bit_for_bit(n_envs: int) -> None:
    box = gym.spaces.Box(-1, 1, (2,))
    ours, theirs = (RolloutBuffer(50, box, box, "cpu", 0.95, 0.99, n_envs) for _ in range(2))
    random = np.random.default_rng(0)
    for name in ("rewards", "values", "episode_starts"):
        drawn = random.random((50, n_envs)) < 0.1 if name == "episode_starts" else random.normal(size=(50, n_envs))
        for buffer in (ours, theirs):
            getattr(buffer, name)[:] = drawn
    last_values, dones = random.normal(size=n_envs).astype(np.float32), np.arange(n_envs) % 2 == 1
    estimate_advantages(ours, last_values, dones)
    theirs.compute_returns_and_advantage(torch.from_numpy(last_values), dones)
    assert np.array_equal(ours.advantages, theirs.advantages)
    assert np.array_equal(ours.returns, theirs.returns)


class Mutable:
    """Something that an environment might change in place."""

    def __init__(self) -> None:
        self.value = 0


class Keeper(gym.Env[np.ndarray, int]):
    """Returns one and the same observation and info, changed in place at each step."""

    observation_space, action_space = gym.spaces.Box(-100, 100, (2,)), gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.observation = np.zeros(2, dtype=np.float32)
        self.info: dict[str, Any] = {"n": 0, "list": [], "array": np.zeros(2), "object": Mutable(), "f": np.float64(0)}
        return self.observation, self.info

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.observation += 1
        self.info["n"] += 1
        self.info["list"].append(self.info["n"])
        self.info["array"] += 1
        self.info["object"].value += 1
        return self.observation, 0.0, self.info["n"] == 7, False, self.info


@pytest.mark.parametrize("wrap", [lambda env: env, VecNormalize])
def test_cheap_copies_are_as_deep_as_they_must_be(wrap: Callable[[Any], Any]) -> None:
    def described(info: dict[str, Any]) -> Any:
        return {k: v.value if k == "object" else np.asarray(v).tolist() for k, v in info.items() if k != "episode"}

    def run(cheap: bool) -> list[Any]:
        env = wrap(make_vec_env(Keeper, n_envs=2))
        env.reset()
        with cheap_copies(env) if cheap else nullcontext():
            steps = [env.step(np.zeros(2, dtype=int)) for _ in range(10)]
        assert type(env.unwrapped.buf_infos) is list
        return [
            (obs.tolist(), rewards.tolist(), dones.tolist(), list(map(described, infos)))
            for obs, rewards, dones, infos in steps
        ]

    assert run(cheap=True) == run(cheap=False)


@pytest.mark.parametrize(("of_torch", "expected"), [(1, 1), (2, 2)])
def test_numpy_has_one_thread_where_torch_has_one(of_torch: int, expected: int) -> None:
    def blas_threads() -> set[int]:
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    seen: list[set[int]] = []

    class Watched(RandomEnv):
        def step(self, action: Any) -> Any:
            seen.append(blas_threads())
            return super().step(action)

    before = torch.get_num_threads()
    torch.set_num_threads(of_torch)
    try:
        with threadpool_limits(2, user_api="blas"):
            model = TRPO("MlpPolicy", Watched(OBSERVATION_SPACES["vector"], ACTION_SPACES["box"]), n_steps=4)
            model.learn(4)
            after = blas_threads()
    finally:
        torch.set_num_threads(before)
    assert model.rollout_path == "fast" and seen == [{expected}] * 4
    assert after == {2}  # as it was
