"""Benchmarks of the optimizer: `launch/bench.py --help` lists them, `launch/bench.py zero1 --help` one's options."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from launch.benchmarks import code as bench_code
from launch.benchmarks import orthogonal as bench_orthogonal
from launch.benchmarks import scale as bench_scale
from launch.benchmarks import sharded as bench_sharded
from launch.benchmarks import step as bench_step
from launch.benchmarks import zero1 as bench_zero1
from launch.job.stopping import run
from launch.job.world import UserError

# One module for each benchmark: its `add_arguments(parser)` describes the options, its `run(options)` prints a table.
BENCHMARKS = {
    "step": bench_step,
    "sharded": bench_sharded,
    "scale": bench_scale,
    "orthogonal": bench_orthogonal,
    "zero1": bench_zero1,
    "code": bench_code,
}


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="benchmark")
    for name, module in BENCHMARKS.items():
        summary = (module.__doc__ or "").split("\n\n")[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (UserError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
