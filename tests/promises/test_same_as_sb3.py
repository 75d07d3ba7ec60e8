"""A promise to users: the fast path and SB3's own collection are one program at two speeds."""

import copy
import re
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, MASKABLE, RandomEnv
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.maskable.distributions import MaskableMultiCategoricalDistribution
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecFrameStack, VecMonitor, VecNormalize
from torch import Tensor, nn

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, PPOClip, PPOPenalty, RecurrentPPOClip, RecurrentTRPO
from sb3_trpo_ext.rollout.known_classes import looks
from sb3_trpo_ext.rollout.sampling import CategoricalSampler

VECTOR_DICT = spaces.Dict(
    {"position": spaces.Box(-1, 1, (2, 2)), "at": spaces.Discrete(5), "flags": spaces.MultiBinary(2)}
)
BUFFER_ARRAYS = (
    *("actions", "observations", "rewards", "episode_starts", "values", "log_probs", "advantages", "returns"),
    *("action_masks", "hidden_states_pi", "cell_states_pi", "hidden_states_vf", "cell_states_vf"),
)


class Listener(RandomEnv):
    """Writes down everything that it is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heard: list[Any] = []

    def step(self, action: Any) -> Any:
        self.heard.append(copy.deepcopy(action))
        observation, _, *rest = super().step(action)
        weights = 0.5 ** np.arange(np.size(action))
        reward = float(np.dot(np.ravel(action), weights))  # another action, another reward
        return observation, reward, *rest


class Observer(BaseCallback):
    """An unknown class of callback, which keeps all that it finds at every step and at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def _look(self) -> None:
        skipped = ("self", "callback", "rollout_buffer", "infos", "iteration")
        found = {name: copy.deepcopy(value) for name, value in self.locals.items() if name not in (*skipped, "env")}
        episodes = [{k: v for k, v in info.items() if k != "episode"} for info in self.locals.get("infos", [])]
        generator = torch.get_rng_state().clone()
        action_dist = self.model.policy.action_dist
        entropy = action_dist.entropy() if hasattr(action_dist, "distribution") else None
        self.seen.append(
            {
                **found,
                **{f"type of {name}": type(self.locals[name]).__name__ for name in self.locals},
                "infos": copy.deepcopy(episodes),
                "torch's generator": generator,
                "numpy's generator": str(np.random.get_state()),
                "entropy": None if entropy is None else entropy.detach().clone(),
                "num_timesteps": (self.num_timesteps, self.n_calls),
                "type of the environment": type(self.training_env).__name__,
            }
        )

    def _on_rollout_start(self) -> None:
        self._look()

    def _on_step(self) -> bool:
        self._look()
        return True

    def _on_rollout_end(self) -> None:
        self._look()


def add_noise_through_data(model: Any, noise: torch.Generator) -> None:
    for param in model.policy.parameters():
        param.data.add_(0.1 * torch.randn(param.shape, generator=noise))


def replace_a_parameter(model: Any, noise: torch.Generator) -> None:
    model.policy.action_net.bias = nn.Parameter(model.policy.action_net.bias.detach() + 0.1)


def replace_the_data_of_a_parameter(model: Any, noise: torch.Generator) -> None:
    model.policy.value_net.weight.data = 1.1 * model.policy.value_net.weight.data


def replace_the_policy(model: Any, noise: torch.Generator) -> None:
    model.policy = copy.deepcopy(model.policy)


def set_parameters(model: Any, noise: torch.Generator) -> None:
    state = {key: 0.9 * value for key, value in model.policy.state_dict().items()}
    model.set_parameters({**model.get_parameters(), "policy": state})


def fill_the_standard_deviation(model: Any, noise: torch.Generator) -> None:
    if hasattr(model.policy, "log_std"):
        model.policy.log_std.data.fill_(-0.7)


def register_a_hook(model: Any, noise: torch.Generator) -> None:
    model.policy.action_net.register_forward_hook(lambda module, inputs, output: output * 1.01)


def remove_the_hooks(model: Any, noise: torch.Generator) -> None:
    model.policy.action_net._forward_hooks.clear()


def replace_a_module(model: Any, noise: torch.Generator) -> None:
    model.policy.mlp_extractor.policy_net = copy.deepcopy(model.policy.mlp_extractor.policy_net)


WAYS = (
    add_noise_through_data,
    replace_a_parameter,
    replace_the_data_of_a_parameter,
    replace_the_policy,
    set_parameters,
    fill_the_standard_deviation,
    register_a_hook,
    remove_the_hooks,
    replace_a_module,
)


class Writer(BaseCallback):
    """Changes the policy at the start of a rollout and every few steps."""

    def __init__(self, ways: list[Any]) -> None:
        super().__init__()
        self.ways = ways

    def _on_rollout_start(self) -> None:
        self._change(self.ways[0])

    def _on_step(self) -> bool:
        if self.n_calls % 5 == 3:
            self._change(self.ways[self.n_calls % len(self.ways)])
        return True

    def _change(self, way: Any) -> None:
        way(self.model, torch.Generator().manual_seed(self.n_calls))


def differences(ours: Any, theirs: Any, path: str = "", *, tolerance: float = 0.0) -> list[str]:
    """Where two values differ in type, dtype or shape, or by more than a tolerance."""
    if isinstance(ours, dict) and type(ours) is type(theirs):
        missing = [f"{path}[{key!r}] in one alone" for key in ours.keys() ^ theirs.keys()]
        pairs = [(f"{path}[{key!r}]", ours[key], theirs[key]) for key in ours.keys() & theirs.keys()]
    elif isinstance(ours, (list, tuple)) and type(ours) is type(theirs):
        missing = [f"{path}: {len(ours)} and {len(theirs)} entries"] if len(ours) != len(theirs) else []
        pairs = [(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(ours, theirs, strict=False))]
    else:  # only what differs is worth a picture
        return [] if alike(ours, theirs, tolerance) else [f"{path}: {ours!r} and {theirs!r}"]
    return missing + [d for where, mine, peer in pairs for d in differences(mine, peer, where, tolerance=tolerance)]


def alike(ours: Any, theirs: Any, tolerance: float) -> bool:
    """Whether two values that hold no others are the same."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, Tensor):
        if (ours.dtype, ours.requires_grad) != (theirs.dtype, theirs.requires_grad):
            return False
        ours, theirs = ours.detach().numpy(), theirs.detach().numpy()
    if isinstance(ours, (np.ndarray, np.generic)):
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            return False
        floating = np.issubdtype(ours.dtype, np.floating) and tolerance
        return np.allclose(ours, theirs, tolerance, tolerance) if floating else np.array_equal(ours, theirs)
    return bool(
        ours == (pytest.approx(theirs, tolerance, tolerance) if isinstance(ours, float) and tolerance else theirs)
    )


def collected(
    algorithm: Any,
    observation: spaces.Space,
    action: spaces.Space,
    n_envs: int = 1,
    wrap: Any = lambda env: env,
    callback: Any = None,
    n_steps: int = 8,
    rollouts: int = 3,
    expect: str | None = "fast",
    update: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Everything that training hands over, in ``rollouts`` rollouts and the updates between them."""
    listeners: list[Listener] = []

    def env() -> gym.Env:
        listeners.append(Listener(observation, action, episode_length=7))
        return TimeLimit(listeners[-1], 5)

    venv = wrap(make_vec_env(env, n_envs=n_envs, seed=1))
    policy = "MultiInputPolicy" if isinstance(observation, spaces.Dict) else "MlpPolicy"
    if issubclass(algorithm, RecurrentPPO):
        policy = policy.replace("Policy", "LstmPolicy")
        options["policy_kwargs"] = {"lstm_hidden_size": 6, **options.get("policy_kwargs", {})}
    if issubclass(algorithm, (PPO, PPOClip, PPOPenalty, RecurrentPPO)):
        options = {"batch_size": n_steps * n_envs // 2 or 1, "n_epochs": 2, "normalize_advantage": False, **options}
        if issubclass(algorithm, TRPO):
            options.pop("n_epochs")
    model = algorithm(policy, venv, n_steps=n_steps, seed=2, device="cpu", **options)
    with torch.no_grad():
        for param in model.policy.parameters():
            param.add_(0.3 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1)))
    if not update:
        model.train = lambda: None
    model.learn(rollouts * n_steps * n_envs, callback=callback)
    if expect is not None:
        assert model.rollout_path.startswith(expect), model.rollout_path
    buffer = model.rollout_buffer
    arrays = {name: getattr(buffer, name) for name in BUFFER_ARRAYS if hasattr(buffer, name)}
    if isinstance(model, (PPO, PPOClip, PPOPenalty)) or type(model) is RecurrentPPO:
        arrays = {}  # their updates may leave them in another order
    return {
        "heard": [listener.heard for listener in listeners],
        "buffer": {**arrays, "full": buffer.full, "pos": buffer.pos, "path": arrays == {} or buffer.generator_ready},
        "torch's generator": torch.get_rng_state(),
        "numpy's generator": str(np.random.get_state()),
        "parameters": [param.detach() for param in model.policy.parameters()],
        "episodes": [{k: v for k, v in info.items() if k != "t"} for info in model.ep_info_buffer],
        "last observation": model._last_obs,
        "last starts": model._last_episode_starts,
        "timesteps": model.num_timesteps,
        "logged": {k: v for k, v in model.logger.name_to_value.items() if not k.startswith("time/")},
        "seen": getattr(callback, "seen", None),
    }


def check_same(
    algorithm: Any,
    *args: Any,
    peer: Any = None,
    callbacks: Any = None,
    fast: Any = "exact",
    expect: str | None = "fast",
    **options: Any,
) -> None:
    """Train by the fast path and by SB3's and compare everything.

    With torch's products to the last bit, through all updates. With NumPy's up to rounding, without updates: these may
    make anything of a last bit.
    """
    tolerance = 0.0
    if fast is True:
        tolerance, options["update"] = 2e-5, False
    first, second = callbacks or (None, None)
    autograd = {} if peer is None else {"fast_updates": False}
    ours = collected(algorithm, *args, callback=first, fast_rollouts=fast, expect=expect, **autograd, **options)
    slow = {"fast_rollouts": False} if peer is None else {}
    theirs = collected(peer or algorithm, *args, callback=second, expect=None, **slow, **options)
    if peer is not None:
        for result in (ours, theirs):
            result["logged"] = {}
    assert not differences(ours, theirs, tolerance=tolerance)[:5]


OBSERVATIONS = {
    "vector": spaces.Box(-1, 1, (5,)),
    "float64": spaces.Box(-3, 3, (2, 3), np.float64),
    "bytes": spaces.Box(0, 255, (7,), np.uint8),
    "discrete": spaces.Discrete(6),
    "wide": spaces.Discrete(5000),
    "multidiscrete": spaces.MultiDiscrete([2, 3]),
    "multibinary": spaces.MultiBinary(4),
    "dict": VECTOR_DICT,
}
ACTIONS = {
    **ACTION_SPACES,
    "float64": spaces.Box(-2, 2, (2,), np.float64),
    "integers": spaces.Box(-5, 5, (2,), np.int64),
    "scalar": spaces.Box(-1, 1, ()),
    "lopsided": spaces.Box(np.array([-1, 0], np.float32), np.array([0.1, 5], np.float32)),
}


FAST = pytest.mark.parametrize("fast", [True, "exact"])


@FAST
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_every_observation_space(observation: str, n_envs: int, fast: Any) -> None:
    check_same(TRPO, OBSERVATIONS[observation], ACTION_SPACES["discrete"], n_envs, fast=fast)


@FAST
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("bootstrap", ["expected", "max"])
@pytest.mark.parametrize("observation", ["vector", "discrete", "dict"])
@pytest.mark.parametrize("algorithm", [TRPO, MaskableTRPO])
def test_action_values(algorithm: Any, observation: str, bootstrap: str, n_envs: int, fast: Any) -> None:
    options = {"critic": "action_value", "bootstrap": bootstrap, "fast": fast}
    space = OBSERVATIONS[observation], ACTION_SPACES["discrete"]
    check_same(algorithm, *space, n_envs, **options)
    check_same(algorithm, *space, n_envs, callbacks=(Observer(), Observer()), **options)


@FAST
@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_space(action: str, n_envs: int, fast: Any) -> None:
    check_same(TRPO, OBSERVATIONS["vector"], ACTIONS[action], n_envs, fast=fast)


@pytest.mark.parametrize("n_envs", [1, 2, 8])
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_ppo_clip_is_ppo(action: str, n_envs: int) -> None:
    check_same(PPOClip, OBSERVATIONS["vector"], ACTION_SPACES[action], n_envs, peer=PPO)


def test_recurrent_ppo_clip_is_recurrent_ppo() -> None:
    """Their updates sum over padding in different orders, so that parameters differ in the last bits."""
    spaces_of = OBSERVATIONS["vector"], ACTION_SPACES["box"]
    ours = collected(RecurrentPPOClip, *spaces_of, 2, rollouts=1, fast_rollouts="exact")
    theirs = collected(RecurrentPPO, *spaces_of, 2, rollouts=1, expect=None)
    for mine, peer in zip(ours.pop("parameters"), theirs.pop("parameters"), strict=True):
        torch.testing.assert_close(mine, peer, rtol=0, atol=1e-5)
    ours["logged"] = theirs["logged"] = {}
    assert not differences(ours, theirs)[:5]


@FAST
@pytest.mark.parametrize("algorithm", [TRPO, PPOClip, PPOPenalty, NPG, RecurrentTRPO, RecurrentPPOClip, MaskableTRPO])
@pytest.mark.parametrize("observation", ["vector", "dict"])
def test_callbacks_see_what_sb3_shows(algorithm: Any, observation: str, fast: Any) -> None:
    actions = ACTION_SPACES["multidiscrete" if algorithm is MaskableTRPO else "box2d"], ACTION_SPACES["discrete"]
    for n_envs, action in zip((2, 1), actions, strict=True):
        observers = Observer(), Observer()
        check_same(algorithm, OBSERVATIONS[observation], action, n_envs, callbacks=observers, fast=fast)


def test_ppo_clip_at_its_defaults_is_ppo_over_its_first_updates() -> None:
    """By NumPy's products: on CartPole-v1 a rounding error changes no action, and so no trajectory."""
    models = [kind("MlpPolicy", "CartPole-v1", seed=0, device="cpu").learn(3 * 2048) for kind in (PPOClip, PPO)]
    assert models[0].rollout_path == "fast"
    for ours, theirs in zip(*(model.policy.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    ours, theirs = (list(model.ep_info_buffer) for model in models)
    assert [(info["r"], info["l"]) for info in ours] == [(info["r"], info["l"]) for info in theirs]


class AsDict(gym.ObservationWrapper):
    """Shows a vector as a Dict with a single key."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = spaces.Dict({"vector": env.observation_space})

    def observation(self, observation: Any) -> Any:
        return {"vector": observation}


@FAST
@pytest.mark.parametrize("algorithm", [TRPO, PPOClip, RecurrentTRPO])
def test_a_dict_of_one_vector_learns_what_the_vector_learns(algorithm: Any, fast: Any) -> None:
    learnt = []
    for policy, wrap in (("Mlp", lambda env: env), ("MultiInput", AsDict)):
        kind = f"{policy}{'Lstm' if issubclass(algorithm, RecurrentPPO) else ''}Policy"
        env = make_vec_env(lambda wrap=wrap: wrap(gym.make("Pendulum-v1")), n_envs=2, seed=0)
        model = algorithm(kind, env, n_steps=64, batch_size=64, seed=0, device="cpu", fast_rollouts=fast).learn(256)
        assert model.rollout_path == "fast"
        learnt.append([param.detach() for param in model.policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*learnt, strict=True))


@FAST
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("action", MASKABLE)
def test_masks_are_read_as_sb3_contrib_reads_them(action: str, n_envs: int, fast: Any) -> None:
    check_same(MaskableTRPO, OBSERVATIONS["vector"], ACTION_SPACES[action], n_envs, fast=fast)
    check_same(MaskableTRPO, OBSERVATIONS["dict"], ACTION_SPACES[action], n_envs, fast=fast)


@pytest.mark.parametrize(
    "memory",
    [
        {},
        {"n_lstm_layers": 2},
        {"enable_critic_lstm": False},
        {"enable_critic_lstm": False, "shared_lstm": True},
        {"lstm_kwargs": {"bias": False}},
        {"net_arch": [], "share_features_extractor": False},
    ],
    ids=str,
)
@pytest.mark.parametrize(("action", "observation"), [("box", "vector"), ("discrete", "dict")])
def test_every_kind_of_memory(memory: dict[str, Any], action: str, observation: str) -> None:
    check_same(RecurrentTRPO, OBSERVATIONS[observation], ACTION_SPACES[action], 2, policy_kwargs=memory)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Sigmoid, nn.SiLU, nn.ELU, nn.LeakyReLU])
@pytest.mark.parametrize(
    ("fast", "net_arch"),
    [("exact", []), ("exact", [7]), (True, [7]), ("exact", {"pi": [5, 4], "vf": []}), ("exact", [256, 256])],
    ids=str,
)
def test_every_activation_and_shape(activation: type[nn.Module], net_arch: Any, fast: Any) -> None:
    options = {"activation_fn": activation, "net_arch": net_arch, "share_features_extractor": False}
    check_same(TRPO, OBSERVATIONS["vector"], ACTION_SPACES["box"], 2, policy_kwargs=options, fast=fast)


def stacked(env: Any) -> Any:
    return VecFrameStack(env, 2)


@pytest.mark.parametrize("wrap", [VecNormalize, VecMonitor, stacked, lambda env: VecNormalize(stacked(env))])
@pytest.mark.filterwarnings("ignore:The environment is already wrapped")
def test_every_wrapper(wrap: Any) -> None:
    check_same(TRPO, OBSERVATIONS["vector"], ACTION_SPACES["box"], 3, wrap=wrap, fast=True)
    check_same(TRPO, OBSERVATIONS["vector"], ACTION_SPACES["box"], 3, wrap=wrap)
    check_same(PPOClip, OBSERVATIONS["vector"], ACTION_SPACES["discrete"], 2, wrap=wrap, peer=PPO)


@FAST
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("algorithm", [TRPO, RecurrentTRPO])
def test_a_policy_that_a_callback_changes_acts_at_once(algorithm: Any, way: Any, fast: Any) -> None:
    writers = Writer([way, WAYS[0]]), Writer([way, WAYS[0]])
    check_same(algorithm, OBSERVATIONS["vector"], ACTION_SPACES["box"], 2, callbacks=writers, expect=None, fast=fast)


@pytest.mark.parametrize("n_envs", [1, 2])
def test_many_small_groups_of_steps(n_envs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_trpo_ext.rollout.fast.PENDING", 30)
    check_same(TRPO, OBSERVATIONS["vector"], ACTION_SPACES["box"], n_envs)
    check_same(RecurrentTRPO, OBSERVATIONS["vector"], ACTION_SPACES["discrete"], n_envs)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 30.0, 1e3, 1e6])
@pytest.mark.parametrize("masked", [False, True])
def test_choices_are_those_of_torchs_multinomial(scale: float, masked: bool) -> None:
    """Near ties included: logits that differ by their rounding alone, equal ones, and many draws."""
    random = torch.Generator().manual_seed(0)
    outputs = scale * torch.randn(8, 7, generator=random).round(decimals=1)
    outputs[::2] = outputs[::2, :1] * (1 + 1e-7 * torch.randn(4, 7, generator=random))
    masks = (torch.rand(outputs.shape, generator=random) < 0.5).numpy() if masked else None
    if masks is not None:
        masks[:, 3] = True
    distribution = MaskableMultiCategoricalDistribution([4, 3]).proba_distribution(outputs)
    distribution.apply_masking(masks)
    sampler = CategoricalSampler(outputs, (4, 3), single=False, exact=True)
    torch.manual_seed(1)
    expected = [distribution.sample().numpy() for _ in range(3000)]
    state = torch.get_rng_state()
    torch.manual_seed(1)
    drawn = [sampler.sample(masks) for _ in range(3000)]
    assert np.array_equal(drawn, expected)
    assert torch.equal(state, torch.get_rng_state())


def test_choices_are_quick_where_they_are_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    quotients = []
    original = CategoricalSampler._by_quotients
    monkeypatch.setattr(CategoricalSampler, "_by_quotients", lambda *a: quotients.append(a) or original(*a))
    torch.manual_seed(0)
    sampler = CategoricalSampler(torch.randn(8, 5), (5,), single=True, exact=True)
    for _ in range(2000):
        sampler.sample()
    assert len(quotients) < 20


numbers = st.integers(1, 4)
boxes = st.builds(
    lambda shape, dtype, low, span: spaces.Box(low, low + span, tuple(shape), dtype),
    st.lists(numbers, min_size=1, max_size=2),
    st.sampled_from([np.float32, np.float64, np.int32, np.uint8]),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([1, 2, 100]),
)
choices = st.one_of(
    st.builds(spaces.Discrete, st.integers(2, 9)),
    st.builds(lambda sizes: spaces.MultiDiscrete(sizes), st.lists(st.integers(2, 5), min_size=1, max_size=3)),
    st.builds(spaces.MultiBinary, numbers),
)
simple = st.one_of(boxes, choices)
dicts = st.dictionaries(st.sampled_from("abcd"), simple, min_size=1, max_size=3).map(spaces.Dict)
wrappers = st.sampled_from([lambda env: env, VecMonitor, lambda env: VecNormalize(env, norm_obs=False), stacked])


@settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    algorithm=st.sampled_from([TRPO, PPOClip, PPOPenalty, NPG, RecurrentTRPO, MaskableTRPO]),
    observation=st.one_of(simple, dicts),
    box=boxes,
    choice=choices,
    continuous=st.booleans(),
    n_envs=st.integers(1, 5),
    n_steps=st.integers(2, 9),
    wrap=wrappers,
    net_arch=st.lists(st.sampled_from([3, 8, 17, 64]), max_size=2),
    watcher=st.sampled_from([None, "observer", "writer"]),
    ways=st.lists(st.sampled_from(WAYS), min_size=1, max_size=3),
    fast=st.sampled_from([True, "exact"]),
)
@pytest.mark.filterwarnings("ignore")
def test_whatever_the_spaces_and_the_callbacks(
    algorithm: Any,
    observation: Any,
    box: Any,
    choice: Any,
    continuous: bool,
    n_envs: int,
    n_steps: int,
    wrap: Any,
    net_arch: list[int],
    watcher: str | None,
    ways: list[Any],
    fast: Any,
) -> None:
    parts = observation.values() if isinstance(observation, spaces.Dict) else [observation]
    # sb3-contrib cannot build LSTM policies for these.
    assume(algorithm is not RecurrentTRPO or not any(isinstance(part, spaces.MultiDiscrete) for part in parts))
    action = box if continuous and algorithm is not MaskableTRPO else choice
    stackable = isinstance(observation, spaces.Box)
    callbacks = {None: None, "observer": (Observer(), Observer()), "writer": (Writer(ways), Writer(ways))}[watcher]
    check_same(
        algorithm,
        observation,
        action,
        n_envs,
        wrap if stackable or wrap is not stacked else VecMonitor,
        callbacks=callbacks,
        n_steps=n_steps,
        policy_kwargs={"net_arch": net_arch},
        expect=None,
        fast=fast,
    )


class Silent(BaseCallback):
    def _on_step(self) -> bool:
        return True


def test_sb3s_own_callbacks_do_not_look() -> None:
    evaluation = EvalCallback(RandomEnv())
    blind = [
        CheckpointCallback(10, "."),
        evaluation,
        ProgressBarCallback(),
        EveryNTimesteps(5, CheckpointCallback(1, ".")),
        StopTrainingOnMaxEpisodes(3),
    ]
    assert not looks(CallbackList([*blind]))
    assert looks(Silent())
    assert looks(CallbackList([evaluation, Silent()]))
    assert looks(EveryNTimesteps(5, Silent()))
    assert looks(EvalCallback(RandomEnv(), callback_on_new_best=Silent()))
    assert looks(EvalCallback(RandomEnv(), callback_after_eval=Silent()))

    class Derived(EvalCallback):
        pass

    assert looks(Derived(RandomEnv()))
    replaced = CheckpointCallback(10, ".")
    replaced._on_step = lambda: True  # type: ignore[method-assign]
    assert looks(replaced)


class LookAhead(BaseCallback):
    """Steps a copy of the environments."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead: list[Any] = []

    def _on_step(self) -> bool:
        if self.n_calls == 5:
            assert type(self.training_env) is DummyVecEnv
            twin = copy.deepcopy(self.training_env)
            for _ in range(3):
                self.ahead.append(twin.step(np.zeros(self.training_env.num_envs, dtype=int))[0])
        return True


@pytest.mark.parametrize("callback", [LookAhead, None])
def test_copies_of_environments_are_independent(callback: Any) -> None:
    check_same(
        TRPO, OBSERVATIONS["vector"], ACTION_SPACES["discrete"], 2, callbacks=callback and (callback(), callback())
    )
    ahead = LookAhead()
    collected(TRPO, OBSERVATIONS["vector"], ACTION_SPACES["discrete"], 2, callback=ahead, rollouts=1)
    assert not np.array_equal(ahead.ahead[0], ahead.ahead[1])


def test_a_wide_one_hot_observation_costs_a_row() -> None:
    result = collected(TRPO, spaces.Discrete(50_000), ACTION_SPACES["discrete"], 2, policy_kwargs={"net_arch": [8]})
    assert result["buffer"]["full"]


@pytest.mark.parametrize(
    ("observation", "action", "words"),
    [
        (spaces.Discrete(4, start=2), ACTION_SPACES["discrete"], r"observation space.*counts from 2"),
        (spaces.Discrete(4, start=-1), ACTION_SPACES["discrete"], r"observation space.*counts from -1"),
        (
            spaces.MultiDiscrete([3, 2], start=[1, 0]),
            ACTION_SPACES["discrete"],
            r"observation space.*counts from \[1 0\]",
        ),
        (spaces.Dict({"here": spaces.Discrete(3, start=1)}), ACTION_SPACES["discrete"], r"'here'.*counts from 1"),
        (OBSERVATIONS["vector"], spaces.Discrete(3, start=1), r"action space.*counts from 1"),
        (OBSERVATIONS["vector"], spaces.MultiDiscrete([3, 2], start=[0, 1]), r"action space.*counts from \[0 1\]"),
        (spaces.Box(-1, 1, ()), ACTION_SPACES["discrete"], r"shape \(1,\)"),
        (spaces.Dict({"x": spaces.Box(-1, 1, ())}), ACTION_SPACES["discrete"], r"'x'.*shape \(1,\)"),
    ],
)
@pytest.mark.parametrize("algorithm", [TRPO, PPOClip])
def test_spaces_that_sb3_would_misread_are_refused(algorithm: Any, observation: Any, action: Any, words: str) -> None:
    policy = "MultiInputPolicy" if isinstance(observation, spaces.Dict) else "MlpPolicy"
    with pytest.raises(ValueError, match=re.compile(words, re.DOTALL)):
        algorithm(policy, RandomEnv(observation, action), device="cpu")


def test_an_observation_outside_of_its_space_is_not_taken_for_another() -> None:
    class Lost(RandomEnv):
        def step(self, action: Any) -> Any:
            return -1, *super().step(action)[1:]

    model = TRPO("MlpPolicy", Lost(spaces.Discrete(5)), n_steps=8, device="cpu")
    with pytest.raises(ValueError, match="outside of its space"):
        model.learn(8)


class Scribbler(Listener):
    """Writes into the action that it is given."""

    def step(self, action: Any) -> Any:
        result = super().step(action)
        if isinstance(action, np.ndarray) and action.ndim:
            action[...] = 1 - action
        return result


class TwoAxes(Listener):
    """Says what is allowed by masks with an axis of their own for each choice."""

    def action_masks(self) -> np.ndarray:
        return super().action_masks().reshape(-1, 2)


class Squashing(ActorCriticPolicy):
    """Says that its actions lie in [-1, 1] and are to be brought to the bounds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._squash_output = True


class OtherExtractor(FlattenExtractor):
    def forward(self, observations: Tensor) -> Tensor:
        return 2 * super().forward(observations)


def rewards_as(dtype: Any) -> Any:
    class Converted(VecEnvWrapper):
        def reset(self) -> Any:
            return self.venv.reset()

        def step_wait(self) -> Any:
            observations, rewards, dones, infos = self.venv.step_wait()
            return observations, (10 * rewards).astype(dtype), dones, infos

    return Converted


def played(
    fast: Any, kind: Any = Listener, algorithm: Any = TRPO, action: str = "box", change: Any = None, **options: Any
) -> Any:
    """A model after a rollout of an unusual environment or policy, and what the environments heard."""
    listeners: list[Any] = []
    wrap, policy = options.pop("wrap", lambda env: env), options.pop("policy", "MlpPolicy")

    def env() -> gym.Env:
        space = spaces.Box(np.array([1, -2, 0], np.float32), np.array([5, 3, 1], np.float32))
        listeners.append(kind(OBSERVATIONS["vector"], space if action == "box" else ACTION_SPACES[action], 7))
        return TimeLimit(listeners[-1], 5)

    model = algorithm(
        policy, wrap(make_vec_env(env, n_envs=2, seed=0)), n_steps=16, seed=0, device="cpu", fast_rollouts=fast
    )
    if change is not None:
        change(model)
    model.train = lambda: None
    model.learn(32, callback=options.pop("watcher", lambda: None)(), **options)
    return model.rollout_buffer, [listener.heard for listener in listeners]


def check_same_play(**options: Any) -> None:
    for fast in ("exact", True):
        (ours, heard), (theirs, expected) = played(fast, **options), played(False, **options)
        assert not differences(heard, expected, tolerance=2e-5)
        for name in ("actions", "rewards", "values", "log_probs", "advantages"):
            assert not differences(getattr(ours, name), getattr(theirs, name), name, tolerance=2e-5)


@pytest.mark.parametrize("action", ["multidiscrete", "multibinary"])
def test_an_environment_may_write_into_its_action(action: str) -> None:
    check_same_play(kind=Scribbler, action=action)


def test_masks_may_have_several_axes() -> None:
    check_same_play(kind=TwoAxes, algorithm=MaskableTRPO, action="multibinary")


def test_actions_that_a_policy_says_it_squashes_are_brought_to_the_bounds() -> None:
    check_same_play(policy=Squashing)


def replace_the_shared_extractor(model: Any) -> None:
    model.policy.features_extractor = OtherExtractor(model.observation_space)


def keep_the_standard_deviation_in_a_buffer(model: Any) -> None:
    value = model.policy.log_std.detach().clone()
    del model.policy.log_std
    model.policy.register_buffer("log_std", value - 0.5)


def replace_sample(model: Any) -> None:
    model.policy.action_dist.sample = model.policy.action_dist.mode


@pytest.mark.parametrize(
    "change", [replace_the_shared_extractor, keep_the_standard_deviation_in_a_buffer, replace_sample]
)
def test_a_policy_changed_where_torch_does_not_look(change: Any) -> None:
    check_same_play(change=change)


@pytest.mark.parametrize("dtype", [np.int64, np.float16, np.float64])
def test_rewards_are_bootstrapped_in_their_own_type(dtype: Any) -> None:
    check_same_play(wrap=rewards_as(dtype))


class Emptier(BaseCallback):
    """Empties the buffer, or replaces an array of it, in the middle of a rollout."""

    def __init__(self, replaces: bool) -> None:
        super().__init__()
        self.replaces = replaces

    def _on_step(self) -> bool:
        buffer = self.model.rollout_buffer
        if self.n_calls == 5:
            if self.replaces:
                buffer.rewards = buffer.rewards.copy()
            else:
                buffer.reset()
        return True


@pytest.mark.parametrize("replaces", [False, True])
def test_a_buffer_that_a_callback_empties_is_not_full(replaces: bool) -> None:
    check_same_play(watcher=lambda: Emptier(replaces))
    buffer, _ = played(True, watcher=lambda: Emptier(replaces))
    assert buffer.full == replaces


@pytest.mark.parametrize("offset", [1e5, 1e7])
def test_logits_of_any_size_keep_their_probabilities(offset: float) -> None:
    outputs = torch.full((4, 4), offset)
    for exact in (True, False):
        torch.manual_seed(0)
        sampler = CategoricalSampler(outputs, (4,), single=True, exact=exact)
        drawn = np.concatenate([sampler.sample() for _ in range(500)])
        torch.manual_seed(0)
        expected = [torch.distributions.Categorical(logits=outputs).sample().numpy() for _ in range(500)]
        assert np.array_equal(drawn, np.concatenate(expected))


def test_another_default_type_of_torch_changes_nothing() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        for fast in (True, "exact"):
            assert played(fast, change=lambda model: model.policy.float())[0].full
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_error_of_an_environment_stays_its_own() -> None:
    class Broken(Listener):
        def step(self, action: Any) -> Any:
            if len(self.heard) == 3:
                raise KeyError("mine")
            observation, *rest = super().step(action)
            observation[0] = np.inf  # of which tanh makes one
            return observation, *rest

    for fast in (True, False):
        with pytest.raises(KeyError, match="mine"):
            played(fast, kind=Broken)


def test_a_rollout_that_is_stopped_values_the_steps_that_it_stored() -> None:
    class Limit(StopTrainingOnMaxEpisodes):
        pass

    for kind in (StopTrainingOnMaxEpisodes, Limit):
        buffer, _ = played(True, watcher=lambda kind=kind: kind(2))
        assert 0 < buffer.pos < 16
        assert np.all(buffer.values[buffer.pos :] == 0) and np.all(buffer.values[: buffer.pos] != 0)


class Selfish(Listener):
    """Holds the policy and changes it."""

    policy: Any = None

    def step(self, action: Any) -> Any:
        if self.policy is not None:
            self.policy.value_net.bias.data.add_(0.1)
        return super().step(action)


def test_an_environment_that_changes_the_policy_is_noticed() -> None:
    def learnt(fast: Any) -> Any:
        env = make_vec_env(lambda: Selfish(OBSERVATIONS["vector"], ACTION_SPACES["box"]), n_envs=1, seed=0)
        model = TRPO("MlpPolicy", env, n_steps=16, seed=0, device="cpu", fast_rollouts=fast)
        model.train = lambda: None  # type: ignore[method-assign]
        env.envs[0].unwrapped.policy = model.policy
        model.learn(32)
        return model

    with pytest.warns(UserWarning, match="no callback did it"):
        ours = learnt("exact")
    assert ours.policy_changes_in_rollouts
    assert np.array_equal(ours.rollout_buffer.values, learnt(False).rollout_buffer.values)
