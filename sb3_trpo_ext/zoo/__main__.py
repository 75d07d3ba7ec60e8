"""``python -m sb3_trpo_ext.zoo``."""

from sb3_trpo_ext.zoo.cli import main

if __name__ == "__main__":
    main()
