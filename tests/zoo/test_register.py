import subprocess
import sys
from importlib import metadata

import pytest
import rl_zoo3
import stable_baselines3
from rl_zoo3 import exp_manager, hyperparams_opt
from rl_zoo3.utils import ALGOS

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, PPOClip, PPOPenalty, RecurrentNPG, RecurrentPPOClip, RecurrentTRPO
from sb3_trpo_ext.zoo import ALGORITHMS, register

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
