"""``trpo-zoo``: the RL Zoo's own programs, with our algorithms in them."""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import sys
from contextlib import ExitStack, redirect_stdout
from typing import Any
from unittest.mock import patch

from sb3_trpo_ext.zoo.registry import ALGORITHMS, register

PROGRAMS = {
    "train": "train an agent, continue a run (-i), or search hyperparameters (--optimize-hyperparameters)",
    "enjoy": "let a trained agent play",
    "record_video": "record a video of a trained agent",
    "plot_train": "plot training returns, lengths or successes",
    "all_plots": "plot and tabulate evaluations",
    "plot_from_file": "plot what all_plots saved",
    "push_to_hub": "share a trained agent on the Hugging Face hub",
    "load_from_hub": "download a trained agent from the Hugging Face hub",
}
PLOTS = ("plot_train", "all_plots", "plot_from_file")
HUB = ("push_to_hub", "load_from_hub", "enjoy")  # the last downloads agents that it does not find

CHECKPOINT_HELP = """Beside the zoo's options:
  --checkpoint-dir DIR   write the whole state of the run into DIR; the same command, started again after its process
                         was killed, goes on from there, in the same folder of logs
  --checkpoint-freq N    timesteps between two checkpoints (default: 30 seconds)"""


def main() -> None:
    """Run the program of the zoo that the first argument names, with the arguments that follow."""
    parser = argparse.ArgumentParser(
        prog="trpo-zoo",
        description="The programs of the RL Zoo (rl_zoo3) as they are, with the algorithms of sb3-trpo-ext as "
        f"{', '.join(ALGORITHMS)}. `trpo` takes the place of sb3-contrib's.",
        epilog="The options of a program are the zoo's: trpo-zoo PROGRAM --help; "
        "they are documented at https://rl-baselines3-zoo.readthedocs.io.",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    listing = "\n".join(f"{name:<15} {purpose}" for name, purpose in PROGRAMS.items())
    parser.add_argument("program", choices=PROGRAMS, metavar="PROGRAM", help=listing)
    program = parser.parse_args(sys.argv[1:2] or ["--help"]).program
    checkpoints, others = checkpoint_options(sys.argv[2:]) if program == "train" else ({}, sys.argv[2:])
    sys.argv = [f"trpo-zoo {program}", *others]
    if {"-h", "--help"} & set(sys.argv):
        print(f"This is the RL Zoo's {program}, with the algorithms of sb3-trpo-ext beside its own.\n")
        if program == "train":
            print(f"{CHECKPOINT_HELP}\n")
    register()
    from sb3_trpo_ext.zoo.experiment import TrustRegionExperimentManager

    before, TrustRegionExperimentManager.checkpoints = TrustRegionExperimentManager.checkpoints, checkpoints
    try:
        run(program)
    finally:
        TrustRegionExperimentManager.checkpoints = before


def checkpoint_options(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What of a command line is about checkpoints, as arguments of ``learn``, and the rest, which is the zoo's."""
    parser = argparse.ArgumentParser(prog="trpo-zoo train", add_help=False, allow_abbrev=False)
    parser.add_argument("--checkpoint-dir")
    parser.add_argument("--checkpoint-freq", type=int)
    found, others = parser.parse_known_args(arguments)
    options = {name: value for name, value in vars(found).items() if value is not None}
    if options and not found.checkpoint_dir:
        parser.error("--checkpoint-freq needs a --checkpoint-dir to write into")
    return options, others


def run(program: str) -> None:
    """Run a program of the zoo in this process, with the arguments of ``sys.argv``."""
    with ExitStack() as stack:
        if int(os.environ.get("RANK", "0")) and "WORLD_SIZE" in os.environ:  # what it prints is what the first one does
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
            # ``--track``: of one run there is one record, the first one's.
            stack.enter_context(patch.dict(os.environ, WANDB_MODE="disabled"))
        if program in HUB:
            from sb3_trpo_ext.zoo.hub import working_hub

            stack.enter_context(working_hub())
        if program in PLOTS:
            getattr(importlib.import_module("rl_zoo3.plots"), program)()
        else:
            runpy.run_module(f"rl_zoo3.{program}", run_name="__main__")
