"""``trpo-zoo``: the RL Zoo's own programs, with our algorithms in them."""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import sys
from contextlib import ExitStack, redirect_stdout

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
    sys.argv = [f"trpo-zoo {program}", *sys.argv[2:]]
    if {"-h", "--help"} & set(sys.argv):
        print(f"This is the RL Zoo's {program}, with the algorithms of sb3-trpo-ext beside its own.\n")
    register()
    run(program)


def run(program: str) -> None:
    """Run a program of the zoo in this process, with the arguments of ``sys.argv``."""
    with ExitStack() as stack:
        if int(os.environ.get("RANK", "0")) and "WORLD_SIZE" in os.environ:  # what it prints is what the first one does
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        if program in HUB:
            from sb3_trpo_ext.zoo.hub import working_hub

            stack.enter_context(working_hub())
        if program in PLOTS:
            getattr(importlib.import_module("rl_zoo3.plots"), program)()
        else:
            runpy.run_module(f"rl_zoo3.{program}", run_name="__main__")
