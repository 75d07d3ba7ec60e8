"""Nothing outlives its model: no memory, and no switch of the process."""

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from envs import make
from torch import Tensor, nn
from torch.distributions import Distribution

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, PPOClip, PPOPenalty, RecurrentNPG, RecurrentPPOClip, RecurrentTRPO
from sb3_trpo_ext.critic.gauss_newton import GaussNewtonCritic
from sb3_trpo_ext.policy.evaluation import UNVALIDATED, consistent_evaluation

ARMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "trpo": (TRPO, {}),
    "adam": (TRPO, {"critic": "adam", "batch_size": 16}),
    "momentum": (TRPO, {"momentum": 0.9, "action": "box"}),
    "sample reuse": (TRPO, {"sample_reuse": 3}),
    "critic of three": (TRPO, {"critic_kwargs": {"n_rollouts": 3}}),
    "kl penalty": (TRPO, {"kl_penalty": 1.0}),
    "theory": (TRPO, {"kl_penalty": "theory"}),
    "largest kl": (TRPO, {"trust_region": "max"}),
    "growing": (TRPO, {"final_n_steps": 64}),
    "chunks": (TRPO, {"fisher_chunk_size": 7, "curvature_samples": None, "ent_coef": 0.1}),
    "sde": (TRPO, {"use_sde": True, "action": "box"}),
    "sb3's rollouts": (TRPO, {"fast_rollouts": False}),
    "images": (TRPO, {"observation": "image"}),
    "dict": (TRPO, {"observation": "dict", "sample_reuse": 2}),
    "npg": (NPG, {"action": "box"}),
    "ppo": (PPOClip, {"batch_size": 16, "max_kl": 0.05}),
    "ppo-penalty": (PPOPenalty, {"batch_size": 16}),
    "recurrent": (RecurrentTRPO, {"momentum": 0.5}),
    "recurrent adam": (RecurrentTRPO, {"critic": "adam", "observation": "dict"}),
    "recurrent npg": (RecurrentNPG, {}),
    "recurrent ppo": (RecurrentPPOClip, {"batch_size": 16}),
    "maskable": (MaskableTRPO, {"sample_reuse": 2}),
    "maskable dict": (MaskableTRPO, {"action": "multidiscrete", "observation": "dict"}),
}


def remains(model: Any) -> list[weakref.ref[Any]]:
    """Weak references to a model and what it is made of."""
    parts = [model, model.policy, model.policy.optimizer, model.rollout_buffer, model.env]
    return [weakref.ref(each) for each in (*parts, *model.policy.parameters(), *model.policy.buffers())]


@pytest.mark.parametrize("arm", ARMS)
def test_nothing_of_a_model_outlives_it(arm: str) -> None:
    algorithm, options = ARMS[arm]
    model = make(algorithm, **options).learn(96)
    references = remains(model)
    del model
    gc.collect()
    assert [each for reference in references if (each := reference()) is not None] == []


def test_nothing_of_a_model_outlives_it_after_a_failure_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(TRPO, momentum=0.9).learn(64)
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env=model.env).learn(64)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GaussNewtonCritic, "fit", interrupted)
        loaded.learn(64)
    references = remains(model) + remains(loaded)
    del model, loaded
    gc.collect()
    assert all(reference() is None for reference in references)


def interrupted(*args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of objects that are only looked at
def test_models_made_one_after_another_leave_no_tensor() -> None:
    def tensors() -> int:
        gc.collect()
        return sum(isinstance(each, Tensor) for each in gc.get_objects())

    make(TRPO).learn(32)  # whatever is built once
    before = tensors()
    for seed in range(4):
        make(TRPO, seed=seed).learn(32)
        make(RecurrentTRPO, seed=seed).learn(32)
    assert tensors() <= before


SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "attention fast path": (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    "flash": (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    "memory-efficient": (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    "cudnn attention": (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    "math": (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    "validation": (lambda: Distribution._validate_args, Distribution.set_default_validate_args),
}


def switches() -> dict[str, Any]:
    """Every flag of the process that an update touches."""
    found = {name: get() for name, (get, _) in SWITCHES.items()}
    cudnn = torch.backends.cudnn
    found["cudnn"] = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
    found["stance"] = torch._dynamo.eval_frame._stance
    return found


@pytest.fixture(params=[True, False])
def usual(request: pytest.FixtureRequest) -> Any:
    """The switches as the user has them: as torch does, or all of them the other way (but for plain attention)."""
    before = switches()
    if not request.param:
        for name, (get, put) in SWITCHES.items():
            put(name == "math" or not get())
    yield switches()
    for name, (_, put) in SWITCHES.items():
        put(before[name])


def test_interleaved_evaluations_leave_the_switches_as_they_were(usual: dict[str, Any]) -> None:
    policies = [make(algorithm).policy for algorithm in (TRPO, RecurrentTRPO, TRPO)]
    for policy in policies:
        policy.mlp_extractor.policy_net.append(Attention(64))
    barriers = [threading.Barrier(2) for _ in range(3)]

    def first() -> None:
        with consistent_evaluation(policies[0]):
            barriers[0].wait()
            barriers[1].wait()  # the other has entered
        barriers[2].wait()  # the first has left, and the other has not

    def second() -> list[Any]:
        barriers[0].wait()
        with consistent_evaluation(policies[1]), consistent_evaluation(policies[2]):
            barriers[1].wait()
            barriers[2].wait()
            return [torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()]

    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(first), pool.submit(second)]
        assert results[1].result() == [False, False]
        results[0].result()
    assert switches() == usual


def test_an_evaluation_that_fails_leaves_the_switches_as_they_were(usual: dict[str, Any]) -> None:
    for policy in (make(TRPO).policy, make(RecurrentTRPO).policy):
        policy.mlp_extractor.policy_net.append(Attention(64))
        with pytest.raises(KeyboardInterrupt), consistent_evaluation(policy):
            raise KeyboardInterrupt
    assert switches() == usual


class Attention(nn.Module):
    """A self-attention over the action network's features, which has a fused kernel without double backward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features.unsqueeze(1)).squeeze(1)


def test_sixteen_models_trained_in_threads_leave_no_trace(usual: dict[str, Any]) -> None:
    arms = [ARMS[arm] for arm in ("trpo", "recurrent", "npg", "ppo-penalty")]

    def train(index: int) -> tuple[Any, bool]:
        algorithm, options = arms[index % len(arms)]
        model = make(algorithm, **{**options, "seed": index})
        if index % len(arms) == 0:
            model.policy.mlp_extractor.policy_net.append(Attention(64))
        before = [param.detach().clone() for param in model.policy.parameters()]
        model.learn(128)
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
        return model, moved

    with ThreadPoolExecutor(4) as pool:
        trained = list(pool.map(train, range(16)))
    for model, moved in trained:
        assert moved and all(bool(param.isfinite().all()) for param in model.policy.parameters())
        assert model.num_timesteps == 128 and not model._reported_rejections
    assert switches() == usual


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("validates", [True, False])
@pytest.mark.parametrize("algorithm", [PPOClip, TRPO])
def test_distributions_are_not_validated_in_an_update_and_as_ever_after(
    algorithm: Any, validates: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Distribution.set_default_validate_args(validates)
    model, seen = make(algorithm, "box", fast_updates=fast), []
    update = model._update

    def observed() -> Any:
        seen.append(Distribution._validate_args)
        result = update()
        seen.append(Distribution._validate_args)
        return result

    monkeypatch.setattr(model, "_update", observed)
    model.learn(64)
    assert seen == [False] * 4
    assert Distribution._validate_args is validates
    for error in (KeyboardInterrupt, ValueError):
        monkeypatch.setattr(model, "_update", raising(error))
        with pytest.raises(error):
            model.learn(32)
        assert Distribution._validate_args is validates


def raising(error: type[BaseException]) -> Callable[[], Any]:
    def update() -> Any:
        assert not Distribution._validate_args
        raise error

    return update


@pytest.mark.parametrize("validates", [True, False])
def test_four_threads_that_train_leave_validation_as_it_was(validates: bool) -> None:
    Distribution.set_default_validate_args(validates)
    start = threading.Barrier(4)

    def train(index: int) -> tuple[bool, str]:
        model = make(PPOClip, "box", batch_size=16, seed=index)
        start.wait()
        for _ in range(4):
            model.learn(32)
            with UNVALIDATED.used(), UNVALIDATED.used():
                assert not Distribution._validate_args
        return bool(model._reported_rejections), model.update_path

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(train, range(4))) == [(False, "fast")] * 4
    assert Distribution._validate_args is validates


@pytest.mark.parametrize("algorithm", [PPOClip, PPOPenalty, TRPO])
def test_what_stood_for_a_policy_does_not_outlive_it(algorithm: Any) -> None:
    model = make(algorithm, "box").learn(64)
    assert model.update_path == "fast"
    references = remains(model)
    policy = weakref.ref(model.policy)
    model.policy = make(algorithm, "box", seed=1).policy
    model.learn(32)
    gc.collect()
    assert policy() is None
    references += remains(model)
    del model
    gc.collect()
    assert all(reference() is None for reference in references)


# What an update takes at its peak, each in a process of its own, beside SB3's PPO


PROGRAM = """
import resource, sys
import gymnasium as gym
import torch
from stable_baselines3 import PPO
from sb3_trpo_ext import PPOClip

class Environment(gym.Env):
    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}
    def step(self, action):
        return self.observation_space.sample(), float(action % 7), self.np_random.random() < 0.05, False, {}

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

torch.set_num_threads(1)
algorithm, observations, actions, options = sys.argv[1:]
space = gym.spaces.Discrete(int(observations)) if observations != "box" else gym.spaces.Box(-1, 1, (8,))
options = {**eval(options), **({"fast_rollouts": False} if algorithm == "PPOClip" else {})}
model = {"PPO": PPO, "PPOClip": PPOClip}[algorithm](
    "MlpPolicy", Environment(space, gym.spaces.Discrete(int(actions))), n_epochs=1, device="cpu", seed=0, **options
)
before = peak()
model.learn(2 * model.n_steps)
print((peak() - before) / 1024, sum(param.nbytes for param in model.policy.parameters()) / 2**20)
"""


def peaks(*arguments: str) -> list[list[float]]:
    """MiB by which two iterations of PPO and PPOClip raise the peak of a process each, and those of the parameters."""
    commands = [[sys.executable, "-c", PROGRAM, algorithm, *arguments] for algorithm in ("PPO", "PPOClip")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    outputs = [process.communicate()[0] for process in processes]
    return [[float(number) for number in output.splitlines()[-1].split()] for output in outputs]


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in KiB")
@pytest.mark.parametrize(
    ("observations", "actions", "options"),
    [("box", 4672, {"n_steps": 1024}), (20_000, 4, {"n_steps": 512})],
    ids=["4672 actions", "one-hot of 20 000"],
)
def test_ppo_clip_takes_little_more_than_ppo(observations: Any, actions: int, options: dict[str, Any]) -> None:
    (theirs, _), (ours, parameters) = peaks(str(observations), str(actions), repr(options))
    copies = 4 * parameters  # of parameters, gradients and both moments, so that an update can be undone
    print(f"PPO {theirs:.0f} MiB, PPOClip {ours:.0f} MiB, of which copies {copies:.0f} MiB")
    assert ours < 1.5 * theirs + copies
