"""Time training against sb3_contrib.TRPO and SB3's PPO, and some cases against sbx, skrl and tianshou; one thread.

    python examples/benchmarks/speed.py                      # all cases, then tables and plot (an hour and a half)
    python examples/benchmarks/speed.py --cases Hopper-v5    # those whose name contains a word
    python examples/benchmarks/speed.py --report             # the tables and the plot of what was measured

The arms of a case are ours, the *peer* of SB3 or sb3-contrib, and those of the other libraries that are installed
(``pip install -e '.[peers]'``). All do the same work on the same environments: networks, rollouts, epochs, minibatches.

Every measurement is a fresh process on one CPU: build, one iteration to warm up and to compile what is compiled, then
the timed iterations of ``learn``. The arms take turns, so that a slow spell of the machine meets all. The first table
shows the median of the paired ratios peer/ours, and the smallest and the largest; the second all arms.

Phases: *rollout* is ``collect_rollouts``; *policy* is ``train`` up to the critic, *critic* the rest of it (for PPO all
of ``train`` is *policy*); *iteration* is the whole of ``learn``. *Environment bound* is ours: training steps a second
over the steps a second of the same vectorised environment stepped with actions drawn beforehand. *Memory* is the peak
of the process during the policy phase above what it held before. *Share of the machine's arithmetic*: the matrix
products of an update are counted by their shapes, and products of these shapes timed alone in the same process, by
torch or NumPy, whichever is quicker; it is that time over the time of the update.

The plot shows the policy phase, of time and of memory, against the batch and against the width of both hidden layers.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from timeit import Timer
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

RESULTS = Path(__file__).parent / "results" / "speed.json"
FIGURE = RESULTS.parent / "speed_scaling.png"
XLA_FLAGS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
PHASES = ("iteration", "rollout", "policy", "critic")


@dataclass(frozen=True)
class Case:
    """What to time.

    Attributes:
        env: Gymnasium id, or a name in `ENVIRONMENTS`.
        n_envs: Environments.
        algorithm: Ours; the peer is the one of SB3 or sb3-contrib in `PEERS`.
        normalize: Wrap in VecNormalize.
        iterations: Timed iterations of a measurement.
        settings: Arguments beyond the defaults, of all arms.
        label: How it is called; empty for a name made of the rest.
        own: Arguments beyond those, of ours alone.
        others: The arms of other libraries, names in `OTHERS`.
    """

    env: str
    n_envs: int
    algorithm: str = "TRPO"
    normalize: bool = False
    iterations: int = 5
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    own: dict[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    @property
    def n_steps(self) -> int:
        """Steps of each environment in a rollout."""
        return int(self.settings.get("n_steps", 2048))

    @property
    def width(self) -> int:
        """Units of each of the two hidden layers of policy and critic."""
        return int(self.settings.get("policy_kwargs", {}).get("net_arch", [64, 64])[0])

    @property
    def name(self) -> str:
        """How table and file call it."""
        if self.label:
            return self.label
        parts = [self.env, f"{self.n_envs} env" + "s" * (self.n_envs > 1)]
        if self.normalize:
            parts.append("VecNormalize")
        if self.algorithm != "TRPO":
            parts.insert(0, f"{self.algorithm} vs {PEERS[self.algorithm].split('.')[1]}")
        return ", ".join(parts)


PEERS = {
    "TRPO": "sb3_contrib.TRPO",
    "PPOClip": "stable_baselines3.PPO",
    "MaskableTRPO": "sb3_contrib.MaskablePPO",
    "RecurrentTRPO": "sb3_contrib.RecurrentPPO",
}

OTHERS = {"sbx": "sbx-rl", "skrl": "skrl", "tianshou": "tianshou"}
"""The arms of other libraries, and the packages that they need."""

LSTM = {"n_steps": 128, "policy_kwargs": {"lstm_hidden_size": 64}}

SHORT = Case("CartPole-v1", 8, iterations=10, settings={"n_steps": 256})
WIDE = Case("HalfCheetah-v5", 1, iterations=3, settings={"policy_kwargs": {"net_arch": [256, 256]}})

CASES = [
    Case("CartPole-v1", 8),
    # skrl's TRPO has Gaussian policies alone
    replace(SHORT, label="CartPole-v1, 8 envs of 256 steps", others=("tianshou",)),
    replace(SHORT, label="Adam critic, CartPole-v1, 8 envs of 256 steps", own={"critic": "adam"}),
    Case("Pendulum-v1", 1),
    Case("Hopper-v5", 1, others=("skrl", "tianshou")),
    Case("Hopper-v5", 8, iterations=3),
    Case("HalfCheetah-v5", 2),
    Case("HalfCheetah-v5", 2, normalize=True),
    Case("Ant-v5", 1),
    Case("random images", 8, iterations=1, settings={"n_steps": 1024}),
    Case("Hopper-v5", 1, algorithm="PPOClip", others=tuple(OTHERS)),
    Case("CartPole-v1", 8, algorithm="PPOClip"),
    replace(SHORT, algorithm="PPOClip", label="PPOClip vs PPO, CartPole-v1, 8 envs of 256 steps", others=tuple(OTHERS)),
    replace(WIDE, algorithm="PPOClip", label="PPOClip vs PPO, HalfCheetah-v5, 256 x 256", others=tuple(OTHERS)),
    Case("CartPole-v1 as a Dict", 8),
    Case("CartPole-v1 with masks", 8, algorithm="MaskableTRPO"),
    Case("Pendulum-v1", 8, algorithm="RecurrentTRPO", iterations=3, settings=LSTM),
]


def scaling_case(batch: int, width: int) -> Case:
    """One point of the plot; the critic, which is not in it, is cut short."""
    settings = {"n_steps": batch // 8, "n_critic_updates": 1, "policy_kwargs": {"net_arch": [width, width]}}
    return Case("random vectors", 8, iterations=2, settings=settings, label=f"batch {batch}, width {width}")


BATCHES = (1024, 4096, 16384, 65536)
WIDTHS = (64, 128, 256, 512, 1024)
SCALING = {
    "samples in the batch (width 64)": {batch: scaling_case(batch, 64) for batch in BATCHES},
    "width of both hidden layers (2048 samples)": {width: scaling_case(2048, width) for width in WIDTHS},
}


EVERY = CASES + [case for points in SCALING.values() for case in points.values()]


class RandomEnv(gym.Env[Any, Any]):
    """Noise to observe, drawn beforehand, and episodes of 256 steps: an environment that costs next to nothing."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.Space[Any]) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        observation_space.seed(0)
        self._observations = [observation_space.sample() for _ in range(16)]
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        return self._observations[0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step."""
        self._steps += 1
        return self._observations[self._steps % 16], float(np.sum(action)), self._steps % 256 == 0, False, {}


class AsDict(gym.ObservationWrapper[Any, Any, Any]):
    """Shows a vector as a Dict of two."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        space = env.observation_space
        assert isinstance(space, gym.spaces.Box)
        self._half = space.shape[0] // 2
        low, high = space.low, space.high
        self.observation_space = gym.spaces.Dict(
            {
                "first": gym.spaces.Box(low[: self._half], high[: self._half]),
                "second": gym.spaces.Box(low[self._half :], high[self._half :]),
            }
        )

    def observation(self, observation: Any) -> dict[str, Any]:
        """The two halves."""
        return {"first": observation[: self._half], "second": observation[self._half :]}


class Masked(gym.Wrapper[Any, Any, Any, Any]):
    """Allows every action, and says so."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        assert isinstance(env.action_space, gym.spaces.Discrete)
        self._all = np.ones(env.action_space.n, dtype=bool)

    def action_masks(self) -> Any:
        """One for each action."""
        return self._all


ENVIRONMENTS: dict[str, Callable[[], gym.Env[Any, Any]]] = {
    "random images": lambda: RandomEnv(gym.spaces.Box(0, 255, (84, 84, 4), np.uint8), gym.spaces.Discrete(6)),
    "random vectors": lambda: RandomEnv(gym.spaces.Box(-1, 1, (11,)), gym.spaces.Box(-1, 1, (3,))),
    "CartPole-v1 as a Dict": lambda: AsDict(gym.make("CartPole-v1")),
    "CartPole-v1 with masks": lambda: Masked(gym.make("CartPole-v1")),
}
POLICIES = {"random images": "CnnPolicy", "CartPole-v1 as a Dict": "MultiInputPolicy"}


def make_env(case: Case) -> Any:
    """The vectorised environment of a case."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    env = make_vec_env(ENVIRONMENTS.get(case.env, case.env), n_envs=case.n_envs, seed=0)
    return VecNormalize(env) if case.normalize else env


class PhaseClock:
    """Seconds and bytes of each phase of a model's iterations."""

    def __init__(self, model: Any) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.peak_mib = 0.0
        self._model = model
        self._critic_start = 0.0
        model.collect_rollouts = self._timed_rollout(model.collect_rollouts)
        model.train = self._timed_train(model.train)

    def _timed_rollout(self, collect: Callable[..., bool]) -> Callable[..., bool]:
        def timed(*args: Any, **kwargs: Any) -> bool:
            start = time.perf_counter()
            result = collect(*args, **kwargs)
            self.seconds["rollout"] += time.perf_counter() - start
            return result

        return timed

    def _timed_train(self, train: Callable[[], None]) -> Callable[[], None]:
        def timed() -> None:
            self._mark_the_critic()
            start, self._critic_start = time.perf_counter(), 0.0
            before = reset_peak_memory()
            train()
            end = time.perf_counter()
            critic_start = self._critic_start or end
            self.seconds["policy"] += critic_start - start
            self.seconds["critic"] += end - critic_start
            if not self._critic_start:
                self._note_memory()
            self.peak_mib = max(self.peak_mib, self._peak - before)

        return timed

    def _mark_the_critic(self) -> None:
        """Note where the critic begins: ours fits one, contrib's asks the buffer for its first minibatch."""
        model = self._model
        if hasattr(model, "value_critic"):
            owner, name, begins = model.value_critic, "fit", lambda *args: True
        elif hasattr(model, "n_critic_updates"):
            owner, name, begins = model.rollout_buffer, "get", lambda *args: args == (model.batch_size,)
        else:
            return
        method = getattr(type(owner), name).__get__(owner)

        def marked(*args: Any, **kwargs: Any) -> Any:
            if begins(*args) and not self._critic_start:
                self._note_memory()
                self._critic_start = time.perf_counter()
            return method(*args, **kwargs)

        setattr(owner, name, marked)

    def _note_memory(self) -> None:
        self._peak = memory_mib("VmHWM")


def memory_mib(key: str) -> float:
    """A line of /proc/self/status, in MiB; NaN where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def reset_peak_memory() -> float:
    """Forget the peak of the process; returns what it holds now, in MiB."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    return memory_mib("VmRSS")


class Matmuls(TorchDispatchMode):
    """Counts the matrix products that torch is asked for.

    Attributes:
        shapes: How many of (m, k) times (k, n).
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, int, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and do it."""
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            left, right = args[1:3] if "add" in name else args[:2]
            self.shapes[left.shape[-2], left.shape[-1], right.shape[-1]] += len(left) if left.dim() == 3 else 1
        return func(*args, **(kwargs or {}))

    @property
    def operations(self) -> int:
        """Floating-point operations of them."""
        return sum(2 * m * k * n * times for (m, k, n), times in self.shapes.items())

    @property
    def seconds(self) -> float:
        """What they take alone."""
        return sum(times * seconds_of_product(*shape) for shape, times in self.shapes.items())


def seconds_of_product(m: int, k: int, n: int) -> float:
    """Seconds of an (m, k) times a (k, n) in float32, by torch or NumPy, whichever is quicker."""
    left, right, out = (np.ones(shape, np.float32) for shape in ((m, k), (k, n), (m, n)))
    by_torch = partial(torch.mm, *map(torch.from_numpy, (left, right)), out=torch.from_numpy(out))
    best = np.inf
    for timer in (Timer(by_torch), Timer(partial(np.dot, left, right, out))):
        repeats = max(1, int(5e-3 / min(timer.repeat(3, 1))))
        best = min(best, min(timer.repeat(5, repeats)) / repeats)
    return float(best)


def products_of_update(model: Any, steps: int) -> Matmuls:
    """The matrix products in the update of one more iteration."""
    matmuls, train = Matmuls(), model.train

    def counted() -> None:
        with matmuls:
            train()

    model.train = counted
    model.learn(steps, reset_num_timesteps=False)
    return matmuls


class Elsewhere:
    """The learner of a library that is not built on SB3, with those methods of SB3's that are timed."""

    def __init__(self, case: Case) -> None:
        self.steps = case.n_steps * case.n_envs
        self.is_ppo = case.algorithm == "PPOClip"
        self.env = gym.make(case.env)
        assert isinstance(self.env.observation_space, gym.spaces.Box)
        self.inputs = self.env.observation_space.shape[0]
        space = self.env.action_space
        self.discrete = isinstance(space, gym.spaces.Discrete)
        self.outputs = int(space.n) if isinstance(space, gym.spaces.Discrete) else int(np.prod(space.shape or 1))
        self.width = case.width

    def network(self, outputs: int) -> nn.Sequential:
        """The network of policy or critic."""
        layers = [nn.Linear(self.inputs, self.width), nn.Tanh(), nn.Linear(self.width, self.width), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(self.width, outputs))

    def collect_rollouts(self) -> None:
        """Collect ``steps`` steps."""
        raise NotImplementedError

    def train(self) -> None:
        """Update from them."""
        raise NotImplementedError

    def learn(self, total_timesteps: int, reset_num_timesteps: bool = True) -> None:
        """Iterations of both."""
        for _ in range(total_timesteps // self.steps):
            self.collect_rollouts()
            self.train()


class Skrl(Elsewhere):
    """Its sequential trainer, which writes nothing and renders nothing; returns are computed in the update."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        from skrl.envs.wrappers.torch import wrap_env
        from skrl.memories.torch import RandomMemory
        from skrl.models.torch import CategoricalMixin, DeterministicMixin, GaussianMixin, Model
        from skrl.trainers.torch import SequentialTrainer

        vector = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
        many = partial(gym.make_vec, case.env, case.n_envs, vectorization_mode="sync", vector_kwargs=vector)
        env = wrap_env(many() if case.n_envs > 1 else self.env, wrapper="gymnasium", verbose=False)
        spaces = {"observation_space": env.observation_space, "action_space": env.action_space, "device": "cpu"}
        spread = nn.Parameter(torch.zeros(self.outputs))

        def learner(mixin: Any, network: nn.Module) -> Any:
            class Learner(mixin, Model):
                def __init__(self) -> None:
                    Model.__init__(self, **spaces)
                    mixin.__init__(self)
                    self.network = network
                    if mixin is GaussianMixin:
                        self.log_std = spread

                def compute(self, inputs: dict[str, Tensor], role: str) -> tuple[Tensor, dict[str, Tensor]]:
                    return self.network(inputs["observations"]), {"log_std": spread}

            return Learner()

        settings: dict[str, Any] = {"rollouts": case.n_steps, "learning_epochs": 10, "time_limit_bootstrap": True}
        settings["experiment"] = {"write_interval": 0, "checkpoint_interval": 0}
        if self.is_ppo:
            settings |= {"mini_batches": self.steps // 64, "learning_rate": 3e-4, "value_clip": 0.0}
            settings |= {"value_loss_scale": 0.5}
        else:
            settings |= {"mini_batches": self.steps // 128, "conjugate_gradient_steps": 15}
        agents = import_module("skrl.agents.torch." + ("ppo" if self.is_ppo else "trpo"))
        self._agent = (agents.PPO if self.is_ppo else agents.TRPO)(
            models={
                "policy": learner(CategoricalMixin if self.discrete else GaussianMixin, self.network(self.outputs)),
                "value": learner(DeterministicMixin, self.network(1)),
            },
            memory=RandomMemory(memory_size=case.n_steps, num_envs=case.n_envs, device="cpu"),
            cfg=settings,
            **spaces,
        )
        run = {
            "timesteps": case.n_steps,
            "headless": True,
            "disable_progressbar": True,
            "close_environment_at_exit": False,
        }
        self._trainer = SequentialTrainer(env=env, agents=self._agent, cfg=run)
        self._update, self._agent.update = self._agent.update, lambda **_: None

    def collect_rollouts(self) -> None:
        """Let the trainer make a rollout, at whose end an update that does nothing waits for ours."""
        self._trainer.train()

    def train(self) -> None:
        """What `post_interaction` does around an update."""
        self._agent.enable_models_training_mode(True)
        self._update(timestep=0, timesteps=self.steps)
        self._agent.enable_models_training_mode(False)


class Tianshou(Elsewhere):
    """What its trainer does, without its tests and logs; values, log-probabilities and returns are in the update."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        from tianshou import algorithm as algorithms
        from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
        from tianshou.algorithm.optim import AdamOptimizerFactory
        from tianshou.data import Collector, VectorReplayBuffer
        from tianshou.env import DummyVectorEnv
        from tianshou.utils.net.common import Net
        from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic
        from tianshou.utils.net.discrete import DiscreteActor

        def body() -> Any:
            return Net(state_shape=(self.inputs,), hidden_sizes=(self.width, self.width), activation=nn.Tanh)

        if self.discrete:
            actor: Any = DiscreteActor(preprocess_net=body(), action_shape=self.outputs, softmax_output=False)
        else:
            actor = ContinuousActorProbabilistic(preprocess_net=body(), action_shape=(self.outputs,), unbounded=True)
        policy = ProbabilisticActorPolicy(
            actor=actor,
            dist_fn=categorical if self.discrete else gaussian,
            action_space=self.env.action_space,
            action_scaling=False,
            action_bound_method=None if self.discrete else "clip",
        )
        rate = AdamOptimizerFactory(lr=3e-4 if self.is_ppo else 1e-3)
        critic = ContinuousCritic(preprocess_net=body())
        if self.is_ppo:
            limits = {"max_grad_norm": 0.5, "ent_coef": 0.0, "vf_coef": 0.5}
            self._algorithm: Any = algorithms.PPO(policy=policy, critic=critic, optim=rate, **limits)
            self._update: dict[str, Any] = {"batch_size": 64, "repeat": 10}
        else:  # a minibatch would have a step of the policy too: ten passes of the critic are of the whole rollout
            self._algorithm = algorithms.TRPO(policy=policy, critic=critic, optim=rate, optim_critic_iters=10)
            self._update = {"batch_size": None, "repeat": 1}
        envs = DummyVectorEnv([partial(gym.make, case.env) for _ in range(case.n_envs)])
        self._collector = Collector(policy, envs, VectorReplayBuffer(self.steps, case.n_envs))
        self._collector.reset()

    def collect_rollouts(self) -> None:
        """Fill the buffer."""
        self._collector.reset_buffer(keep_statistics=True)
        self._algorithm.policy.is_within_training_step = True
        self._collector.collect(n_step=self.steps)

    def train(self) -> None:
        """Update from the buffer."""
        self._algorithm.update(buffer=self._collector.buffer, **self._update)


def gaussian(parameters: tuple[Tensor, Tensor]) -> torch.distributions.Distribution:
    """Of mean and σ."""
    return torch.distributions.Independent(torch.distributions.Normal(*parameters), 1)


def categorical(logits: Tensor) -> torch.distributions.Distribution:
    """Of logits."""
    return torch.distributions.Categorical(logits=logits)


def policy_of(case: Case) -> str:
    """The name of the policy."""
    return "MlpLstmPolicy" if case.algorithm == "RecurrentTRPO" else POLICIES.get(case.env, "MlpPolicy")


def make_model(case: Case, arm: str, device: str) -> Any:
    """The learner of an arm."""
    if arm in ("skrl", "tianshou"):
        return {"skrl": Skrl, "tianshou": Tianshou}[arm](case)
    place = {"ours": f"sb3_trpo_ext.{case.algorithm}", "sbx": "sbx.PPO"}.get(arm, PEERS[case.algorithm])
    package, name = place.split(".")
    settings = case.settings | (case.own if arm == "ours" else {})
    model = getattr(import_module(package), name)(policy_of(case), make_env(case), seed=0, device=device, **settings)
    if arm == "sbx":
        model.train = partial(train_and_wait, model, model.train)
    return model


def train_and_wait(model: Any, train: Callable[[], None]) -> None:
    """JAX returns before it has computed."""
    train()
    import_module("jax").block_until_ready((model.policy.actor_state.params, model.policy.vf_state.params))


def measure(case: Case, arm: str, device: str) -> dict[str, float]:
    """One measurement, in this process: seconds an iteration and its phases, and what else is in the tables."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    model = make_model(case, arm, device)
    steps = case.n_steps * case.n_envs
    clock = PhaseClock(model)
    if case.iterations > 1:
        model.learn(steps)
        clock.seconds = dict.fromkeys(PHASES, 0.0)
    start = time.perf_counter()
    model.learn(case.iterations * steps, reset_num_timesteps=False)
    clock.seconds["iteration"] = time.perf_counter() - start
    result = {phase: seconds / case.iterations for phase, seconds in clock.seconds.items()}
    result |= {"steps": steps, "policy_mib": clock.peak_mib}
    if isinstance(model, Elsewhere):
        return result | arithmetic(model, steps)

    env = model.get_env()
    env.reset()
    actions = [np.array([env.action_space.sample() for _ in range(case.n_envs)]) for _ in range(case.n_steps)]
    start = time.perf_counter()
    for action in actions:
        env.step(action)
    result["environment_bound"] = (time.perf_counter() - start) / result["iteration"]
    if policy_of(case) != "MlpPolicy":  # convolutions and LSTMs are not matrix products
        return result
    if arm == "sbx":  # torch cannot count what JAX does; it is what SB3's PPO does
        model = make_model(case, "peer", device)
        model.learn(steps)
    return result | arithmetic(model, steps)


def arithmetic(model: Any, steps: int) -> dict[str, float]:
    """The floating-point operations of an update, and the seconds that matrix products of its shapes take alone."""
    matmuls = products_of_update(model, steps)
    return {"operations": matmuls.operations, "products": matmuls.seconds}


def installed(package: str) -> str | None:
    """Its version; None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def arms_of(case: Case, device: str) -> list[str]:
    """The arms of a case that can be measured here, other libraries on the CPU alone; says which cannot."""
    if device != "cpu":
        return ["ours", "peer"]
    missing = [arm for arm in case.others if installed(OTHERS[arm]) is None]
    if missing:
        print(f"{case.name}: without {', '.join(missing)}, not installed (pip install -e '.[peers]')", file=sys.stderr)
    return ["ours", "peer", *(arm for arm in case.others if arm not in missing)]


def run_all(cases: list[Case], repetitions: int, device: str) -> None:
    """Measure all arms of every case in turn, and keep the file current."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}
    packages = ["sb3-trpo-ext", "stable-baselines3", "sb3-contrib", "torch", "numpy", *OTHERS.values(), "jax"]
    found = {name: installed(name) for name in packages}
    results["versions"] = results.get("versions", {}) | {name: number for name, number in found.items() if number}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    one_thread = {"OMP_NUM_THREADS": "1", "XLA_FLAGS": XLA_FLAGS}
    for case in cases:
        arms, rounds = arms_of(case, device), []
        for repetition in range(repetitions):
            measured = {}
            first = repetition % len(arms)
            for arm in arms[first:] + arms[:first]:
                command = [sys.executable, __file__, "--measure", case.name, arm, "--device", device]
                finished = subprocess.run(
                    command, check=True, env={**os.environ, **one_thread}, stdout=subprocess.PIPE, text=True
                )
                measured[arm] = json.loads(finished.stdout.splitlines()[-1])
            rounds.append(measured)
            print(f"{case.name}: {repetition + 1} of {repetitions}", file=sys.stderr, flush=True)
        results["cases"][key_of(case, device)] = rounds
        partial_file = RESULTS.with_suffix(".partial")
        partial_file.write_text(json.dumps(results, indent=1) + "\n")
        partial_file.replace(RESULTS)


def key_of(case: Case, device: str) -> str:
    """How the results file calls a case."""
    return case.name if device == "cpu" else f"{case.name}, {device}"


def spread(values: list[float]) -> str:
    """The median with the smallest and the largest; empty if there is nothing to compare."""
    if not np.isfinite(values).all():
        return ""
    return f"**{np.median(values):.2f}** ({min(values):.2f} to {max(values):.2f})"


def report() -> None:
    """Print the Markdown tables of what was measured."""
    rows = tuple(case.name for case in CASES)
    measured = {
        name: rounds for name, rounds in json.loads(RESULTS.read_text())["cases"].items() if name.startswith(rows)
    }
    report_ratios(measured)
    print()
    report_arms(measured)


def report_ratios(measured: dict[str, Any]) -> None:
    """The peer, and the fastest of the other libraries, over ours."""
    columns = ["whole iteration", "fastest other library", "rollout", "policy step", "critic", "environment bound"]
    print("| " + " | ".join(["case", *columns, "policy memory, ours/peer"]) + " |")
    print("|---" * 8 + "|")
    for name, pairs in measured.items():
        cells = [
            spread([pair["peer"][phase] / pair["ours"][phase] if pair["ours"][phase] else np.nan for pair in pairs])
            for phase in PHASES
        ]
        cells.insert(1, fastest_other(pairs))
        cells.append(spread([pair["ours"]["environment_bound"] for pair in pairs]))
        memory = [pair["ours"]["policy_mib"] / max(pair["peer"]["policy_mib"], 1e-9) for pair in pairs]
        big = np.median([pair["peer"]["policy_mib"] for pair in pairs]) > 100
        print(f"| {name} | " + " | ".join([*cells, spread(memory) if big else ""]) + " |")


def fastest_other(rounds: list[dict[str, Any]]) -> str:
    """The other library of the shortest median iteration, and its ratio; empty if none was measured."""
    others = [arm for arm in OTHERS if all(arm in measured for measured in rounds)]
    if not others:
        return ""
    arm = min(others, key=lambda other: float(np.median([measured[other]["iteration"] for measured in rounds])))
    return f"{arm} {spread([measured[arm]['iteration'] / measured['ours']['iteration'] for measured in rounds])}"


def report_arms(measured: dict[str, Any]) -> None:
    """Medians of every arm."""
    print("| case | arm | steps/s | collect, ms | update, ms | GFLOP an update | share of the machine's arithmetic |")
    print("|---" * 7 + "|")
    for name, rounds in measured.items():
        for arm in rounds[0]:
            runs = [each[arm] for each in rounds]
            if "steps" not in runs[0]:
                continue
            updates = [run["policy"] + run["critic"] for run in runs]
            label = "SB3, sb3-contrib" if arm == "peer" else arm
            cells = [f"{np.median([run['steps'] / run['iteration'] for run in runs]):.0f}"]
            cells += [f"{1000 * np.median(seconds):.0f}" for seconds in ([run["rollout"] for run in runs], updates)]
            if "products" in runs[0]:
                cells.append(f"{np.median([run['operations'] for run in runs]) / 1e9:.2f}")
                shares = [run["products"] / update for run, update in zip(runs, updates, strict=True)]
                cells.append(f"{100 * np.median(shares):.0f} %")
            print(f"| {name} | {label} | " + " | ".join(cells + [""] * (5 - len(cells))) + " |")


def plot(figure_path: Path) -> None:
    """Draw time and memory of the policy phase against batch and width, as far as they were measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measured = json.loads(RESULTS.read_text())["cases"]
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex="col", layout="constrained")
    panels = {"policy": (1000, "policy step, ms"), "policy_mib": (1, "its peak memory, MiB")}
    for column, (title, points) in enumerate(SCALING.items()):
        sizes = [size for size, case in points.items() if case.name in measured]
        for row, (key, (factor, name)) in enumerate(panels.items()):
            panel = axes[row, column]
            for arm, label, colour in (("ours", "sb3_trpo_ext.TRPO", "C0"), ("peer", "sb3_contrib.TRPO", "C1")):
                values = [[factor * pair[arm][key] for pair in measured[points[size].name]] for size in sizes]
                panel.plot(sizes, [np.median(each) for each in values], "o-", color=colour, label=label)
                panel.fill_between(sizes, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.2)
            panel.set(xscale="log", yscale="log", xticks=sizes, xticklabels=[f"{size:,}" for size in sizes])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(name)
        axes[1, column].set_xlabel(title)
    axes[0, 0].legend(frameon=False)
    figure.savefig(figure_path, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="*", default=[""], metavar="WORD", help="only cases whose name has one of these"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="measurements of each arm")
    parser.add_argument("--device", default="cpu", help="device of the models")
    parser.add_argument(
        "--figure", type=Path, default=RESULTS.parent / "speed_scaling.png", help="where to draw the plot"
    )
    parser.add_argument("--report", action="store_true", help="only print the table")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "ARM"), help="one measurement (used internally)")
    args = parser.parse_args()
    if args.measure:
        case = next(case for case in EVERY if case.name == args.measure[0])
        print(json.dumps(measure(case, args.measure[1], args.device)))
        return
    if not args.report:
        run_all(
            [case for case in EVERY if any(word in case.name for word in args.cases)], args.repetitions, args.device
        )
    report()
    plot(args.figure)


if __name__ == "__main__":
    main()
