"""Train the same model with several optimizers, each at its best learning rate, and compare.

    python launch/compare.py --out compared --optimizers adamw sm3 sm3-paper --models small medium --steps 1000

Every optimizer starts from the learning rate that `launch/train.py` uses by default. Rates are doubled and halved until
the best lies between two others; the best and its two neighbours are then run with every seed. Each run is a
`launch/train.py` in a process of its own. Finished ones are kept in `--out`, and a second call goes on where the first
was stopped; after a change of the code take another directory. At the end stand a table and two pictures: loss curves,
and final loss against bytes of optimizer state.

Options of `launch/train.py` that are not listed here, such as --batch-size, go to every run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from launch.comparison.comparison import FEWER_BYTES, Comparison, Contestant
from launch.comparison.standings import TABLE, draw, table
from launch.job import packages
from launch.job.alone import alone
from launch.job.command_line import Parser, saying_mistakes
from launch.job.model import PRESETS
from launch.job.stopping import run
from launch.job.world import UserError


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what is not known here is for `launch/train.py`."""
    how = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="compare.py", description=__doc__, formatter_class=how, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs; one that has some goes on")
    parser.add_argument(
        "--optimizers",
        nargs="+",
        default=["adamw", "sm3"],
        help="those of launch/train.py --optimizer, where sm3 is the recipe adamw-like; sm3-paper, sm3-muon-like: "
        "other recipes; sm3-16: covers of 16; and with fewer bytes, as in sm3-bf16 or sm3-muon-like-momentum8, "
        f"any of {', '.join(FEWER_BYTES)} (default: adamw sm3)",
    )
    sizes = f"{', '.join(PRESETS)} (default: small)"
    parser.add_argument("--models", nargs="+", default=["small"], choices=list(PRESETS), metavar="MODEL", help=sizes)
    parser.add_argument(
        "--seeds", type=int, default=3, help="for the best learning rate and its neighbours (default: 3)"
    )
    parser.add_argument("--seeds-around", type=int, help="seeds for its neighbours, if not as many")
    parser.add_argument("--no-sweep", action="store_true", help="run every optimizer at its default rate alone")
    parser.add_argument("--steps", default="1000", help="optimizer steps (default: 1000)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time (default: one per core)")
    known, common = parser.parse_known_args(arguments)
    if min(known.seeds, known.jobs, known.seeds if known.seeds_around is None else known.seeds_around) < 1:
        raise UserError("--seeds, --seeds-around and --jobs must be at least 1")
    for name in ("--lr", "--seed", "--model", "--optimizer", "--recipe"):
        if name in (argument.split("=")[0] for argument in common):
            raise UserError(f"{name} is for compare.py to choose; --models, --optimizers and --seeds say from what")
    return known, ["--steps", known.steps, "--parallel", "none", *common]


@saying_mistakes
def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    console = Console()
    options, common = parse(arguments)
    contestants = [Contestant(model, name) for model in options.models for name in options.optimizers]
    for contestant in contestants:
        _ = contestant.arguments  # raises before anything is run
    sweep, around = not options.no_sweep, options.seeds_around
    with alone(options.out):
        comparison = Comparison(options.out, contestants, options.seeds, common, sweep, around)
        packages.load("matplotlib")  # for the pictures, which come last
        for contestant in contestants:
            if comparison.wanted(contestant):
                contestant.check()
        comparison.run_all(options.jobs, console)
        standings = table(comparison)
        console.print(standings)
        with (options.out / TABLE).open("w") as file:
            Console(file=file, width=120).print(standings)
        draw(comparison)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
