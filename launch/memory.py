"""The most memory that training a decoder takes in several ways, sharded with FSDP2, against the size of the model.

    python launch/memory.py --out measured --models 125m 350m 760m 1.3b
    python launch/memory.py --out measured --device cuda

Each measurement is a `launch/footprint/footprint.py` in fresh processes under torchrun. Finished ones are kept in
`--out`, and a second call goes on where the first was stopped. At the end stand a table, in bytes per parameter, summed
over the ranks, and its picture.

On a GPU the bytes of tensors are counted, without what PyTorch's allocator holds in reserve. On the CPU the allocator
is part of what is measured: as glibc comes, it keeps freed memory. Processes are therefore started with the environment
that `ALLOCATOR` holds: what is larger than 128 kB goes back to the system when it is freed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from launch.footprint.bars import draw_bars
from launch.footprint.footprint import WAYS, ways_on
from launch.footprint.meters import METERS
from launch.job import packages, records
from launch.job.alone import alone
from launch.job.command_line import Parser, saying_mistakes
from launch.job.model import PRESETS
from launch.job.stopping import output, run
from launch.job.world import UserError

MODELS = {"cpu": ["125m", "350m", "760m", "1.3b"], "cuda": ["1.3b", "6.7b", "13b", "20b"]}
RESULTS, TABLE, PICTURE = "results.jsonl", "table.txt", "memory.png"
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "2"}
Key = tuple[str, str]
"""Way and model."""


class Measurements:
    """All measurements, those made and those to make.

    Args:
        out: the directory that holds them.
        ways: names of :data:`launch.footprint.footprint.WAYS`.
        models: names of the presets, smallest first.
        ranks: how many processes share each model.
        most: leave out what will hold more than so many bytes.
        device: type of the device.
    """

    def __init__(
        self, out: Path, ways: list[str], models: list[str], ranks: int, most: float, device: str = "cpu"
    ) -> None:
        self.out, self.ways, self.models, self.ranks, self.most = out, ways, models, ranks, most
        self.device = device
        out.mkdir(parents=True, exist_ok=True)
        made = [each for each in records.read(out / RESULTS) if len(each["bytes"]) == ranks]
        made = [each for each in made if each.get("device", "cpu") == device]
        self.records: dict[Key, dict[str, Any]] = {(each["way"], each["model"]): each for each in made}

    def make_all(self, console: Console) -> None:
        """Measure what has not been measured, and tell."""
        for model in self.models:
            for way in self.ways:
                if (way, model) in self.records or self.too_large(way, model):
                    continue
                record = self.measure(way, model)
                self.records[way, model] = record
                records.append(self.out / RESULTS, record)
                said = f"{model} {way}: {sum(record['bytes']):,} bytes, {per_parameter(record):.2f} per parameter"
                console.print(said, highlight=False, soft_wrap=True)

    def too_large(self, way: str, model: str) -> bool:
        """Whether weights, gradients and state alone exceed what is allowed."""
        return WAYS[way].held * PRESETS[model].count(seq_len=1) > self.most

    def measure(self, way: str, model: str) -> dict[str, Any]:
        """Make one measurement.

        Raises:
            UserError: it failed.
        """
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        command += [str(Path(__file__).with_name("footprint") / "footprint.py"), "--way", way, "--model", model]
        command += ["--device", self.device]
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | ALLOCATOR
        done = output(command, environment)
        if done.returncode:
            raise UserError(f"{' '.join(command[1:])} failed:\n{done.stderr.strip()}")
        record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return record

    def table(self) -> Table:
        """One line for each way, one column for each model."""
        counted = "resident" if self.device == "cpu" else "allocated"
        table = Table(title=f"Peak {counted} bytes per parameter, summed over {self.ranks} ranks")
        table.add_column("")
        table.add_column("weights, gradients, state", justify="right")
        for model in self.models:
            table.add_column(f"{PRESETS[model].count(seq_len=1) / 1e6:,.0f} M", justify="right")
        for way in self.ways:
            made = [self.records.get((way, model)) for model in self.models]
            cells = [f"{per_parameter(record):.2f}" if record else "" for record in made]
            table.add_row(WAYS[way].label, f"{WAYS[way].held}", *cells)
        return table

    def draw(self) -> None:
        """Draw the table."""
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
        draw_bars(axes, [self.records[key] for key in self.records if key[0] in self.ways and key[1] in self.models])
        figure.savefig(self.out / PICTURE, dpi=120)
        pyplot.close(figure)


def all_gpus(ranks: int | None, most: float | None) -> tuple[int, float]:
    """As many ranks as there are GPUs, and as many bytes as they have, unless it is said otherwise.

    Raises:
        UserError: there are none.
    """
    count = torch.cuda.device_count()
    if not count:
        raise UserError("--device cuda needs a GPU, and torch finds none; leave it out to measure on the CPU")
    ranks = count if ranks is None else ranks
    return ranks, ranks * torch.cuda.mem_get_info(0)[1] if most is None else most


def per_parameter(record: dict[str, Any]) -> float:
    """Bytes of all ranks per parameter of the model."""
    return float(sum(record["bytes"]) / record["parameters"])


@saying_mistakes
def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = Parser(prog="memory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the results; one that has some goes on")
    parser.add_argument("--device", default="cpu", choices=list(METERS), help="default: cpu")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="default: those for the device")
    parser.add_argument("--models", nargs="+", choices=list(PRESETS), help="default: some that fit the device")
    parser.add_argument("--ranks", type=int, help="processes that share each model (default: 2; on GPUs all of them)")
    parser.add_argument(
        "--most",
        type=float,
        help="bytes; what must hold more is left out (default: 12.5e9; on GPUs all that they have)",
    )
    console = Console()
    given = parser.parse_args(arguments)
    ranks, most = given.ranks, given.most
    if given.device == "cuda":
        ranks, most = all_gpus(ranks, most)
    packages.load("matplotlib")  # for the picture, which comes after hours
    ranks = 2 if ranks is None else ranks
    if ranks < 1:
        raise UserError(f"--ranks {ranks} must be at least 1")
    ways, models = given.ways or ways_on(given.device), given.models or MODELS[given.device]
    with alone(given.out):
        most = 12.5e9 if most is None else most
        measurements = Measurements(given.out, ways, models, ranks, most, given.device)
        measurements.make_all(console)
        console.print(measurements.table())
        with (given.out / TABLE).open("w") as file:
            Console(file=file, width=120).print(measurements.table())
        measurements.draw()
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
