"""Arguments of benchmarks."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """A number of at least 1, as an argument.

    Example:
        >>> count("3")
        3
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value
