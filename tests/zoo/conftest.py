"""What the tests of the RL Zoo share."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sb3_trpo_ext.zoo import register

register()

Build = Callable[..., Any]


@pytest.fixture
def experiment(tmp_path: Path) -> Build:
    """Build a zoo experiment as its command line does: ``experiment(algo, env, **arguments of the manager)``."""
    from rl_zoo3.exp_manager import ExperimentManager

    def build(algo: str, env: str, **kwargs: Any) -> Any:
        settings = {"eval_freq": -1, "log_interval": -1, "seed": 0, "verbose": 0, "device": "cpu"} | kwargs
        return ExperimentManager(argparse.Namespace(), algo, env, str(tmp_path / "logs"), **settings)

    return build
