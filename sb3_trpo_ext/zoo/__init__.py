"""Our algorithms in the RL Zoo (https://github.com/DLR-RM/rl-baselines3-zoo): ``pip install "sb3-trpo-ext[zoo]"``.

On the command line, ``trpo-zoo`` (or ``python -m sb3_trpo_ext.zoo``) runs the zoo's own programs with them. In a script
of your own, `register` puts them there, and the zoo's functions are called as always::

    from sb3_trpo_ext.zoo import register

    register()
    from rl_zoo3.train import train

    train()
"""

from sb3_trpo_ext.zoo.registry import ALGORITHMS, register

__all__ = ["ALGORITHMS", "register"]
