"""The command line of `launch/train.py`, made of the fields of :class:`Options`, and what other commands have of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from functools import wraps
from typing import Any, NoReturn

from rich.console import Console

from launch.job.model import PRESETS
from launch.job.options import Options, flag
from launch.job.parallel import PARALLEL
from launch.job.recipe import OPTIMIZERS, RECIPES, SCHEDULES
from launch.job.world import UserError

# Options that choose an entry of a table.
CHOICES = {
    "model": list(PRESETS),
    "optimizer": ["sm3", *OPTIMIZERS],
    "recipe": list(RECIPES),
    "parallel": ["auto", *PARALLEL],
    "schedule": list(SCHEDULES),
}


TRAINING = "Train a byte-level language model, with SM3 or another optimizer, on one or several processes."


def parse(arguments: Sequence[str], prog: str = "train.py", description: str = TRAINING) -> Options:
    """Read the command line.

    Args:
        arguments: without the name of the command.
        prog: the command.
        description: what it does, for ``--help``.

    Raises:
        UserError: it does not fit.

    Example:
        >>> parse(["--optimizer", "adamw", "--lr", "1e-3"]).lr
        0.001
    """
    parser = Parser(prog=prog, description=description)
    for item in fields(Options):
        add(parser, item)
    return Options(**vars(parser.parse_args(arguments)))


def add(parser: argparse.ArgumentParser, item: Field[Any]) -> None:
    if item.metadata["type"] is bool:
        parser.add_argument(flag(item.name), action="store_true", help=item.metadata["help"])
    else:
        about = item.metadata
        text = about["help"] if item.default is None else f"{about['help']} (default: {item.default})"
        parser.add_argument(
            flag(item.name),
            default=item.default,
            type=about["type"],
            choices=CHOICES.get(item.name, about["choices"]),
            help=text,
        )


class Parser(argparse.ArgumentParser):
    """A parser whose errors are :class:`UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def saying_mistakes(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Have a command say in a line what is wrong, when that is a mistake of the user; its exit status is then 2."""

    @wraps(main)
    def command(arguments: list[str]) -> int:
        try:
            return main(arguments)
        except (UserError, OSError) as error:
            Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
            return 2

    return command
