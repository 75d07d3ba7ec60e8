"""Time data-parallel training: two workers on this machine, and up to 1024 by simulation.

    python examples/benchmarks/scaling.py                      # everything (half an hour)
    python examples/benchmarks/scaling.py --cases Hopper-v5    # those whose name contains a word
    python examples/benchmarks/scaling.py --simulate           # the simulation alone
    python examples/benchmarks/scaling.py --learn              # what two workers learn, alone
    python examples/benchmarks/scaling.py --report             # tables and plot of what was measured

*Measured.* Ways to train on twice the environments of a case, against *single*, one process with those of the case:

- *ceiling*: two single processes side by side that know nothing of each other, which is what the machine has to give;
- *workers*: ``torchrun --nproc-per-node=2``, each worker with the environments of the case;
- *subprocesses*: one process with SB3's SubprocVecEnv of twice the environments;
- *peer*: the same by sb3-contrib's TRPO, or SB3's PPO.

Every measurement is fresh processes of one thread: one iteration to warm up, then all wait for each other, then the
timed iterations. The arms take turns. The tables show steps a second of all processes together over those of *single*,
the median of paired ratios with the smallest and the largest.

*Learnt.* Hopper-v5, 150k steps, VecNormalize: two workers of one environment beside one process of two; mean return of
the last 100 training episodes, over seeds, with its 95 % Student-t interval.

*Simulated.* One process takes real updates as the first of W workers: it computes what a worker computes, and wherever
a message would travel it waits for as long as a network needs, while the others' shares are copies of its own. A
message takes α · steps + volume / B, with the steps and volumes of the algorithms (`steps_and_volume`). α and B are
fitted to messages between 2, 3 and 4 processes of this machine, more than it has processors, or published figures
(`NETWORKS`).
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from jobs import interval
from speed import spread
from torch import Tensor

from sb3_trpo_ext.training.communicator import DIRECT_BYTES, DIRECT_WORKERS, ProcessGroup

RESULTS = Path(__file__).parent / "results" / "scaling.json"
FIGURE = RESULTS.parent / "scaling.png"
ARMS = ("single", "ceiling", "workers", "subprocesses", "peer")
PEERS = {"TRPO": "sb3_contrib.TRPO", "PPOClip": "stable_baselines3.PPO"}
SEEDS = range(5)
LEARNERS = ("one process, 2 environments", "2 workers, 1 environment each")
WORKERS = [2**power for power in range(11)]
SIZES = [16, 256, 4096, 16384, 65536]
"""Numbers of 32 bits in the messages that are timed."""


@dataclass(frozen=True)
class Case:
    """What to time.

    Attributes:
        algorithm: Ours.
        env: Gymnasium id.
        n_envs: Environments of a worker.
        n_steps: Steps of each in a rollout.
        iterations: Timed iterations.
        asked: The share of the ceiling that two workers are to reach.
        batch_size: Samples of a minibatch for each worker; 0 for the default, which is of all together.
    """

    algorithm: str
    env: str
    n_envs: int = 1
    n_steps: int = 2048
    iterations: int = 4
    asked: float = 0.95
    batch_size: int = 0

    @property
    def name(self) -> str:
        """How tables call it."""
        minibatch = f", {self.batch_size} a worker and minibatch" * bool(self.batch_size)
        return f"{self.algorithm}, {self.env}, {self.n_envs} env" + "s" * (self.n_envs > 1) + minibatch


CASES = [
    Case("TRPO", "Hopper-v5"),
    Case("TRPO", "HalfCheetah-v5"),
    Case("TRPO", "CartPole-v1", n_envs=8, n_steps=256, iterations=16, asked=0.9),
    Case("PPOClip", "Hopper-v5", asked=0.8),
    Case("PPOClip", "Hopper-v5", asked=0.8, batch_size=64),
]


@dataclass(frozen=True)
class Network:
    """What carries messages.

    Attributes:
        name: How plot and table call it.
        latency: α, seconds a communication step.
        bandwidth: B, bytes a second.
        source: Where these are from.
        tree: Whether sums and gathers go by doubling in log₂ W steps, which gloo has not, instead of along a ring.
    """

    name: str
    latency: float
    bandwidth: float
    source: str
    tree: bool = False

    def seconds(self, kind: str, size: int, workers: int) -> float:
        """What a message takes.

        Args:
            kind: ``"all_reduce"``, ``"all_gather"`` or ``"broadcast"``.
            size: Bytes of what one worker has.
            workers: W.
        """
        steps, volume = steps_and_volume(kind, size, workers, tree=self.tree)
        return self.latency * steps + volume / self.bandwidth


def steps_and_volume(kind: str, size: int, workers: int, *, tree: bool = False) -> tuple[float, float]:
    """Communication steps, and bytes that a worker receives.

    Few workers send to all others at once; beyond, sums and gathers of gloo go along a ring, and broadcasts by a tree
    (https://github.com/pytorch/gloo/blob/main/docs/algorithms.md).
    """
    rounds = math.ceil(math.log2(workers)) if workers > 1 else 0
    if kind == "broadcast":
        return rounds, size * rounds
    if workers <= 2 or (workers <= DIRECT_WORKERS and size <= DIRECT_BYTES):
        return rounds and 1, size * (workers - 1)
    around = 2 if kind == "all_reduce" else 1
    volume = 2 * size * (workers - 1) / workers if kind == "all_reduce" else size * (workers - 1)
    return around * (rounds if tree else workers - 1), volume


OSU = "OSU micro-benchmarks of MPICH over gigabit Ethernet and over InfiniBand by UCX: "
OSU += "https://gist.github.com/jfgrimm/3af692a5475bdd4ed836b5a18197a209"
NETWORKS = [
    Network("TCP, gigabit Ethernet", 25e-6, 116e6, OSU),
    Network("TCP, doubling instead of a ring", 25e-6, 116e6, OSU, tree=True),
    Network("InfiniBand", 0.93e-6, 11.6e9, OSU),
]


NO_TIME = Network("none", 0.0, math.inf, "imagined")


class SimulatedWorkers:
    """What the first of W workers meets where all have the same samples: messages that take their time.

    Args:
        workers: W.
        network: What carries them.
    """

    rank = 0

    def __init__(self, workers: int, network: Network) -> None:
        self.workers, self.network = workers, network
        self.messages = self.bytes = 0
        self._drawn: dict[int, list[Tensor]] = {}

    def _travel(self, kind: str, vector: Tensor) -> None:
        end = time.perf_counter() + self.network.seconds(kind, vector.nbytes, self.workers)
        self.messages += 1
        self.bytes += int(steps_and_volume(kind, vector.nbytes, self.workers)[1])
        while time.perf_counter() < end:
            pass

    def all_reduce(self, vector: Tensor) -> Tensor:
        """See `core.reduction.Communicator`."""
        self._travel("all_reduce", vector)
        return vector * self.workers

    def all_gather(self, vector: Tensor) -> list[Tensor]:
        """See `core.reduction.Communicator`."""
        self._travel("all_gather", vector)
        if vector.dtype != torch.uint8:
            return [vector] * self.workers
        drawn = self._drawn.setdefault(len(vector), [])  # samples: the others have drawn what was drawn before
        drawn.append(vector)
        return [vector, *(drawn[-1 - number % len(drawn)] for number in range(1, self.workers))]

    def broadcast(self, vector: Tensor) -> Tensor:
        """See `core.reduction.Communicator`."""
        self._travel("broadcast", vector)
        return vector


# Measured: what runs in the processes of an arm.


def train_timed(case: Case, arm: str, meeting: Path, n_processes: int) -> None:
    """Train as one process of an arm, and print the steps a second of all workers that it is one of."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import SubprocVecEnv

    torch.set_num_threads(1)
    twice = arm in ("subprocesses", "peer")
    n_envs = case.n_envs * (2 if twice else 1)
    env = make_vec_env(case.env, n_envs, seed=0, vec_env_cls=SubprocVecEnv if twice else None)
    package, name = (PEERS[case.algorithm] if arm == "peer" else f"sb3_trpo_ext.{case.algorithm}").split(".")
    workers = int(os.environ.get("WORLD_SIZE", 1))
    arguments = {"n_steps": case.n_steps}
    if case.batch_size:
        arguments["batch_size"] = case.batch_size * workers * (2 if twice else 1)
    model = getattr(import_module(package), name)("MlpPolicy", env, seed=0, device="cpu", **arguments)
    steps = case.n_steps * n_envs * workers
    model.learn(steps)
    (meeting / str(os.getpid())).touch()
    while len(list(meeting.iterdir())) < n_processes:
        time.sleep(0.01)
    start = time.perf_counter()
    model.learn(case.iterations * steps, reset_num_timesteps=False)
    seconds = time.perf_counter() - start
    found = {"rate": case.iterations * steps / seconds}
    for name in ("messages", "message_bytes"):  # of the last update and the rollout before it
        found[name] = model.logger.name_to_value.get(f"train/{name}", 0)
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(found), flush=True)
    env.close()


def measure(case: Case, arm: str) -> dict[str, float]:
    """Run the processes of an arm."""
    alone = [sys.executable, __file__]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    n_processes = 2 if arm in ("ceiling", "workers") else 1
    with tempfile.TemporaryDirectory() as meeting:
        work = ["--train", case.name, arm, meeting, str(n_processes)]
        commands = [torchrun + work] if arm == "workers" else [alone + work] * n_processes
        running = [
            subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
            for command in commands
        ]
        told = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"{arm} of {case.name} failed.")
    found = [json.loads(text.splitlines()[-1]) for text in told]
    return found[0] | {"rate": sum(each["rate"] for each in found)}


# Learnt.


def learn_one(seed: int) -> None:
    """Train as one process, or as one of two workers, and print the score of the first."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    from sb3_trpo_ext import TRPO

    torch.set_num_threads(1)
    env = VecNormalize(make_vec_env("Hopper-v5", 2 // int(os.environ.get("WORLD_SIZE", 1))))
    model = TRPO("MlpPolicy", env, n_steps=1024, seed=seed, device="cpu").learn(150_000)
    if int(os.environ.get("RANK", 0)) == 0:
        assert model.ep_info_buffer is not None  # since it has learnt
        print(float(np.mean([episode["r"] for episode in model.ep_info_buffer])), flush=True)


def learn_all() -> dict[str, list[float]]:
    """The scores of both ways, seed by seed."""
    scores: dict[str, list[float]] = {learner: [] for learner in LEARNERS}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for seed in SEEDS:
        for learner, launcher in zip(LEARNERS, ([], torchrun), strict=True):
            command = [sys.executable, *launcher, __file__, "--learn-one", str(seed)]
            told = subprocess.run(
                command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
            ).stdout
            scores[learner].append(float(told.splitlines()[-1]))
            print(f"{learner}, seed {seed}: {scores[learner][-1]:.0f}", file=sys.stderr, flush=True)
    return scores


# Simulated.


def time_messages() -> None:
    """As one of the workers that torchrun started, time messages of several sizes, and let the first one print them."""
    torch.set_num_threads(1)
    group = ProcessGroup.of_this_process()
    assert group is not None  # started by torchrun
    kinds: dict[str, Callable[[Tensor], Any]] = {
        "all_reduce": group.all_reduce,
        "all_gather": group.all_gather,
        "broadcast": group.broadcast,
    }
    rows = []
    for kind, send in kinds.items():
        for size in SIZES:
            vector, seconds = torch.ones(size), []
            for _ in range(60):
                start = time.perf_counter()
                send(vector)
                seconds.append(time.perf_counter() - start)
            rows.append({"kind": kind, "bytes": vector.nbytes, "workers": group.workers, "seconds": median(seconds)})
    if group.rank == 0:
        print(json.dumps(rows), flush=True)


def fitted() -> tuple[Network, list[dict[str, Any]]]:
    """α and B of this machine by least squares of relative errors, and the messages that they are fitted to."""
    rows = []
    for workers in (2, 3, 4):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        told = subprocess.run(
            [*torchrun, __file__, "--time-messages"],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        rows += json.loads(told.splitlines()[-1])
    seconds = np.array([row["seconds"] for row in rows])
    columns = np.array([steps_and_volume(row["kind"], row["bytes"], row["workers"]) for row in rows])
    latency, per_byte = np.linalg.lstsq(columns / seconds[:, None], np.ones(len(rows)), rcond=None)[0]
    return Network("this machine, gloo", float(latency), 1 / float(per_byte), "fitted"), rows


def simulate(updates: int = 9) -> dict[str, Any]:
    """Time updates of TRPO on Hopper-v5 for every number of workers and network."""
    from stable_baselines3.common.env_util import make_vec_env

    from sb3_trpo_ext import TRPO
    from sb3_trpo_ext.core.reduction import ALONE, SharedReduction
    from sb3_trpo_ext.rollout.buffers import whole_rollout

    torch.set_num_threads(1)
    here, messages = fitted()
    model = TRPO("MlpPolicy", make_vec_env("Hopper-v5", 1, seed=0), seed=0, device="cpu")
    model.learn(2 * 2048)
    start = time.perf_counter()
    callback = model._init_callback(None)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)  # type: ignore[arg-type]
    rollout = time.perf_counter() - start
    parameters = model.get_parameters()
    rows = []
    for network in [here, *NETWORKS]:
        for workers in WORKERS:
            simulated = SimulatedWorkers(workers, NO_TIME)
            model.reduction = SharedReduction(simulated) if workers > 1 else ALONE
            for _ in range(min(workers - 1, 512)):
                whole_rollout(model.rollout_buffer, model.action_space, model.reduction).subset(512)
            simulated.network = network
            seconds = []
            for _ in range(updates):
                model.policy.load_state_dict(parameters["policy"])
                simulated.messages = simulated.bytes = 0
                start = time.perf_counter()
                model.train()
                seconds.append(time.perf_counter() - start)
            rows.append(
                {
                    "network": network.name,
                    "workers": workers,
                    "update": median(seconds),
                    "messages": simulated.messages,
                    "bytes": simulated.bytes,
                }
            )
            print(f"{network.name}, {workers} workers: {1e3 * median(seconds):.1f} ms", file=sys.stderr, flush=True)
    networks = [asdict(each) for each in (here, *NETWORKS)]
    return {"networks": networks, "messages": messages, "rollout": rollout, "updates": rows}


# Reports.


def report(results: dict[str, Any]) -> None:
    """Print the tables and draw the plot."""
    if results.get("cases"):
        head = ("case", "ceiling C", "workers", "workers / C", "asked", "subprocesses", "peer with subprocesses")
        print(f"| {' | '.join(head)} | messages, kB an update |\n|---{'|---' * len(head)}|")
        for case in CASES:
            rounds = results["cases"].get(case.name)
            if rounds:
                print(row_of(case, rounds))
    if "learning" in results:
        print("\n| Hopper-v5, 150k steps, seeds 0 to 4 | return |\n|---|---|")
        for learner, scores in results["learning"].items():
            print(f"| {learner} | {interval(scores)} |")
    if "simulation" in results:
        report_simulation(results["simulation"])


def row_of(case: Case, rounds: list[dict[str, Any]]) -> str:
    """A row of the table."""

    def over(arm: str, other: str) -> str:
        return spread([each[arm]["rate"] / each[other]["rate"] for each in rounds])

    sent = rounds[0]["workers"]
    cells = [over(arm, "single") for arm in ("ceiling", "workers")]
    cells += [over("workers", "ceiling"), f"{case.asked}"]
    cells += [over(arm, "single") for arm in ("subprocesses", "peer")]
    return f"| {case.name} | " + " | ".join(cells) + f" | {sent['messages']:.0f}, {sent['message_bytes'] / 1e3:.0f} |"


def report_simulation(simulation: dict[str, Any]) -> None:
    """Print a table of efficiencies, and draw the plot."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    print(f"\n| network | α, B | {' | '.join(map(str, WORKERS))} |\n|---|---|" + "---|" * len(WORKERS))
    for network in simulation["networks"]:
        rows = [row for row in simulation["updates"] if row["network"] == network["name"]]
        updates = np.array([row["update"] for row in rows])
        efficiency = (simulation["rollout"] + updates[0]) / (simulation["rollout"] + updates)
        style = "--" if network["tree"] else "-"
        left.loglog(WORKERS, 1e3 * updates, style, marker=".", label=network["name"])
        right.semilogx(WORKERS, efficiency, style, marker=".", label=network["name"])
        alpha = f"{1e6 * network['latency']:.3g} µs, {network['bandwidth'] / 1e9:.3g} GB/s"
        print(f"| {network['name']} | {alpha} | " + " | ".join(f"{each:.2f}" for each in efficiency) + " |")
    for axis, name in ((left, "ms an update"), (right, "efficiency of weak scaling")):
        axis.set(xlabel="workers", ylabel=name)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    right.set_ylim(0, 1.05)
    left.legend(fontsize=8)
    figure.suptitle("Simulated: TRPO, Hopper-v5, 2048 steps a worker and rollout, waiting as long as messages take")
    figure.savefig(FIGURE, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=[""], help="only cases whose name contains one of these")
    parser.add_argument("--repetitions", type=int, default=5, help="rounds of all arms")
    parser.add_argument("--learn", action="store_true", help="only learn")
    parser.add_argument("--learn-one", type=int, metavar="SEED", help="used internally")
    parser.add_argument("--simulate", action="store_true", help="only simulate")
    parser.add_argument("--report", action="store_true", help="only report")
    parser.add_argument("--train", nargs=4, metavar=("CASE", "ARM", "MEETING", "PROCESSES"), help="used internally")
    parser.add_argument("--time-messages", action="store_true", help="used internally")
    args = parser.parse_args()
    if args.train:
        name, arm, meeting, processes = args.train
        train_timed(next(case for case in CASES if case.name == name), arm, Path(meeting), int(processes))
        return
    if args.learn_one is not None:
        learn_one(args.learn_one)
        return
    if args.time_messages:
        time_messages()
        return
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}
    chosen = [case for case in CASES if any(word in case.name for word in args.cases)]
    some = args.report or args.simulate or args.learn
    for case in [] if some else chosen:
        rounds = []
        for repetition in range(args.repetitions):
            turn = repetition % len(ARMS)
            rounds.append({arm: measure(case, arm) for arm in ARMS[turn:] + ARMS[:turn]})
            print(f"{case.name}: {repetition + 1} of {args.repetitions}", file=sys.stderr, flush=True)
        results["cases"][case.name] = rounds
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    everything = not some and args.cases == [""]
    for name, wanted, run in (("learning", args.learn, learn_all), ("simulation", args.simulate, simulate)):
        if wanted or everything:
            results[name] = run()
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    report(results)


if __name__ == "__main__":
    main()
