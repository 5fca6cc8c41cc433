"""The command ``sm3_dist``, or ``python -m sm3_dist``: see :mod:`sm3_dist.planner.command`."""

from sm3_dist import __version__
from sm3_dist.planner import command


def main() -> None:
    """Run it with the arguments of this process."""
    command.main(version=__version__)


if __name__ == "__main__":
    main()
