import importlib
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import rl_zoo3
import stable_baselines3
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from rl_zoo3 import exp_manager, hyperparams_opt
from rl_zoo3.utils import ALGOS

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, PPOClip, PPOPenalty, RecurrentNPG, RecurrentPPOClip, RecurrentTRPO
from sb3_trpo_ext.zoo import ALGORITHMS, cli, register

NAMES = {
    "trpo": TRPO,
    "npg": NPG,
    "ppo_clip": PPOClip,
    "ppo_penalty": PPOPenalty,
    "trpo_lstm": RecurrentTRPO,
    "npg_lstm": RecurrentNPG,
    "ppo_clip_lstm": RecurrentPPOClip,
    "trpo_mask": MaskableTRPO,
}


def test_every_algorithm_has_a_class_a_sampler_and_a_converter() -> None:
    assert ALGORITHMS == NAMES
    for name, algorithm in NAMES.items():
        assert issubclass(ALGOS[name], algorithm)
        assert name in hyperparams_opt.HYPERPARAMS_SAMPLER
        assert name in hyperparams_opt.HYPERPARAMS_CONVERTER


def test_the_algorithms_of_the_zoo_stay() -> None:
    assert ALGOS["ppo"] is stable_baselines3.PPO
    assert hyperparams_opt.HYPERPARAMS_SAMPLER["a2c"] is hyperparams_opt.sample_a2c_params


def test_registering_twice_changes_nothing() -> None:
    def state() -> list[dict[str, object]]:
        modules = (rl_zoo3, exp_manager, hyperparams_opt, rl_zoo3.utils, rl_zoo3.callbacks)
        return [dict(vars(module)) for module in modules] + [
            dict(ALGOS),
            dict(hyperparams_opt.HYPERPARAMS_SAMPLER),
            dict(hyperparams_opt.HYPERPARAMS_CONVERTER),
        ]

    before = state()
    register()
    assert state() == before


@pytest.mark.parametrize("imported_before", [True, False])
def test_the_order_of_imports_does_not_matter(imported_before: bool) -> None:
    lines = ["import rl_zoo3.train", "from sb3_trpo_ext.zoo import register; register()"]
    check = "import rl_zoo3.train; print(rl_zoo3.train.ExperimentManager.__name__)"
    code = "\n".join([*(lines if imported_before else reversed(lines)), check])
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == "TrustRegionExperimentManager"


def test_an_absent_zoo_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("sb3_trpo_ext.zoo.registry.version", absent)
    with pytest.raises(ImportError, match=r'rl_zoo3\) is not installed.*pip install "sb3-trpo-ext\[zoo\]"'):
        register()


@pytest.mark.parametrize("found", ["2.7.0", "1.8.0", "2.0.0a9"])
def test_an_old_zoo_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr("sb3_trpo_ext.zoo.registry.version", lambda name: found)
    with pytest.raises(ImportError, match=rf"rl_zoo3 {found} is too old: 2.8 or newer.*pip install"):
        register()


def test_importing_the_package_does_not_import_the_zoo() -> None:
    code = "import sys, sb3_trpo_ext, sb3_trpo_ext.zoo; print('rl_zoo3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"


# Sharing agents, against a folder that stands in for the Hugging Face hub


class Hub:
    """What the zoo calls of the hub, on a folder.

    The methods have the signatures of ``huggingface_hub.HfApi``, as far as they are used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, repo_id: str, *, token: Any, private: bool, exist_ok: bool) -> str:
        (self.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return f"hub/{repo_id}"

    def snapshot_download(self, repo_id: str, *, local_dir: Path) -> None:
        shutil.copytree(self.folder / repo_id, local_dir, dirs_exist_ok=True)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)

    def hf_hub_download(self, repo_id: str, filename: str, **library: str) -> str:
        path = self.folder / repo_id / filename
        if not path.exists():
            raise LocalEntryNotFoundError(f"{filename} is not in {repo_id}")
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub(tmp_path / "hub-server")
    for name in ("create_repo", "snapshot_download", "upload_folder"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, staticmethod(getattr(stand_in, name)))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", stand_in.hf_hub_download)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "True")
    monkeypatch.chdir(tmp_path)
    return stand_in


def zoo(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["trpo-zoo", *arguments])
    cli.main()


@pytest.mark.parametrize("normalize", [True, False])
def test_an_agent_goes_to_the_hub_and_comes_back(hub: Hub, monkeypatch: pytest.MonkeyPatch, normalize: bool) -> None:
    agent = ("--algo", "trpo", "--env", "CartPole-v1")
    settings = ("--hyperparams", "n_envs:1", "n_steps:64", f"normalize:{normalize}")
    zoo(monkeypatch, "train", *agent, "-f", "logs", "-n", "128", "--eval-freq", "64", "--seed", "0", *settings)
    zoo(monkeypatch, "push_to_hub", *agent, "-f", "logs", "-orga", "someone", "--no-render", "-m", "Train an agent")

    there = hub.folder / "someone" / "trpo-CartPole-v1"
    card = (there / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "stable-baselines3"
    assert metadata["model-index"][0]["name"] == "TRPO"
    assert metadata["model-index"][0]["results"][0]["dataset"]["name"] == "CartPole-v1"
    assert "**TRPO** Agent playing **CartPole-v1**" in card
    assert "python -m sb3_trpo_ext.zoo load_from_hub --algo trpo --env CartPole-v1 -orga someone" in card
    assert 'pip install "sb3-trpo-ext[zoo]"' in card
    assert "rl_zoo3." not in card

    zoo(monkeypatch, "load_from_hub", *agent, "-f", "downloaded", "-orga", "someone")
    back = Path("downloaded/trpo/CartPole-v1_1")
    assert (back / "CartPole-v1/vecnormalize.pkl").exists() == normalize
    zoo(monkeypatch, "enjoy", *agent, "-f", "downloaded", "--no-render", "-n", "20")
    sent, received = (TRPO.load(folder / "CartPole-v1.zip") for folder in (Path("logs/trpo/CartPole-v1_1"), back))
    for a, b in zip(sent.policy.parameters(), received.policy.parameters(), strict=True):
        assert (a == b).all()


def test_a_masked_agent_is_evaluated_with_masks_on_its_way(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import gymnasium as gym

    name = max(name for name in gym.registry if name.startswith("Taxi-"))
    agent = ("--algo", "trpo_mask", "--env", name)
    zoo(monkeypatch, "train", *agent, "-f", "logs", "-n", "128", "--eval-freq", "-1", "--hyperparams", "n_steps:16")
    zoo(monkeypatch, "push_to_hub", *agent, "-f", "logs", "-orga", "someone", "--no-render", "-m", "x", "--stochastic")
    results = yaml.safe_load((hub.folder / f"someone/trpo_mask-{name}/results.json").read_text())
    assert results["mean_reward"] >= -300  # a forbidden pick-up costs 10: a random agent without masks pays far more


def test_nothing_of_the_hub_stays_changed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("huggingface_sb3", "huggingface_sb3.push_to_hub", "huggingface_hub.repocard")
    modules = [importlib.import_module(name) for name in names]
    before = [dict(vars(module)) for module in modules]
    with pytest.raises(SystemExit):
        zoo(monkeypatch, "push_to_hub", "--help")
    assert [dict(vars(module)) for module in modules] == before


def test_an_agent_that_the_hub_does_not_have(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = ("--algo", "npg", "--env", "CartPole-v1")
    with pytest.raises(Exception, match=r"npg-CartPole-v1\.zip is not in someone/npg-CartPole-v1"):
        zoo(monkeypatch, "load_from_hub", *agent, "-f", "downloaded", "-orga", "someone")
    assert not Path("downloaded").exists()
