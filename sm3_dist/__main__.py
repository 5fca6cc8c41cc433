"""``python -m sm3_dist``: see :mod:`sm3_dist.planner.command`."""

from sm3_dist.planner.command import main

if __name__ == "__main__":
    main()
