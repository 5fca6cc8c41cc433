"""A comparison: which optimizer runs with which learning rate and seed, and what came of it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from launch.job import records
from launch.job.folder import CONFIG, METRICS
from launch.job.model import GPT, PRESETS
from launch.job.recipe import OPTIMIZERS, RECIPES
from launch.job.stopping import output
from launch.job.world import UserError

RESULTS = "results.jsonl"
MOST_HALVINGS = 6
"""So far the sweep goes down where training comes to nothing."""
Trial = tuple[int, int]
"""``(k, seed)``: one run, at the learning rate ``start * 2^k``."""


# SM3 with float32 weights and fewer bytes of momentum, and with bfloat16 weights, rounded stochastically or not.
FEWER_BYTES = {
    "momentum16": ("--momentum-dtype", "bfloat16"),
    "momentum8": ("--momentum-dtype", "int8"),
    "bf16": ("--dtype", "bfloat16"),
    "bf16-momentum16": ("--dtype", "bfloat16", "--momentum-dtype", "bfloat16"),
    "bf16-momentum8": ("--dtype", "bfloat16", "--momentum-dtype", "int8"),
    "bf16-nearest": ("--dtype", "bfloat16", "--momentum-dtype", "bfloat16", "--rounding", "nearest"),
}


@dataclass(frozen=True)
class Contestant:
    """An optimizer on a model.

    Args:
        model: size of the model.
        name: ``adamw``; ``sm3-paper``: SM3 with that recipe, ``sm3``: with the one that is like AdamW; ``sm3-16``: with
            covers of 16 elements; ``sm3-bf16``, ``sm3-muon-like-momentum8``: in fewer bytes, as :data:`FEWER_BYTES`
            has it.
    """

    model: str
    name: str

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments of `launch/train.py` that ask for it.

        Raises:
            UserError: nobody knows it.

        Example:
            >>> Contestant("small", "sm3-16").arguments
            ('--model', 'small', '--optimizer', 'sm3', '--recipe', 'adamw-like', '--cover-block', '16')
            >>> Contestant("small", "sm3-muon-like-momentum8").arguments[4:]
            ('--recipe', 'muon-like', '--momentum-dtype', 'int8')
        """
        kind, recipe, variant = self._parts
        covers = variant.isdecimal() and int(variant) > 0
        if not (recipe or kind in OPTIMIZERS) or (variant and not covers and variant not in FEWER_BYTES):
            variants = ["sm3", *(f"sm3-{variant}" for variant in (*RECIPES, *FEWER_BYTES))]
            known = ", ".join([*OPTIMIZERS, *variants, "sm3-16 (covers of 16 elements)", "sm3-muon-like-momentum8"])
            raise UserError(f"--optimizers {self.name}: there is none of that name; known are {known}")
        how = ("--recipe", recipe) if recipe else ()
        further = ("--cover-block", variant) if covers else FEWER_BYTES.get(variant, ())
        return ("--model", self.model, "--optimizer", kind, *how, *further)

    @property
    def start(self) -> float:
        """The learning rate that its sweep starts from."""
        kind, recipe, _ = self._parts
        return (RECIPES[recipe] if recipe else OPTIMIZERS[kind]).best.lr

    def check(self) -> None:
        """Make the optimizer once, for a run of it may come after hours of others.

        Raises:
            UserError: its package is missing; says how to install it.
        """
        kind, recipe, _ = self._parts
        if not recipe:
            OPTIMIZERS[kind].make(GPT(PRESETS["tiny"], seq_len=32), OPTIMIZERS[kind].best)

    @property
    def _parts(self) -> tuple[str, str, str]:
        """What of the name is the optimizer, which recipe of SM3, and what comes after it."""
        if not f"{self.name}-".startswith("sm3-"):
            return self.name, "", ""
        rest = self.name.removeprefix("sm3").removeprefix("-")
        recipe = next((name for name in RECIPES if f"{rest}-".startswith(f"{name}-")), "")
        return "sm3", recipe or "adamw-like", rest.removeprefix(recipe).removeprefix("-")


def wanted(
    results: Mapping[Trial, float], seeds: int, sweep: bool = True, seeds_around: int | None = None
) -> list[Trial]:
    """Which runs are still to be made, given the final losses so far (``inf`` where training came to nothing).

    Example:
        >>> wanted({(0, 0): 3.0}, seeds=2, sweep=False)
        [(0, 1)]
        >>> wanted({}, seeds=2)
        [(-1, 0), (0, 0), (1, 0)]
        >>> wanted({(-1, 0): 3.0, (0, 0): 2.0, (1, 0): 1.0}, seeds=2)  # the best lies at the edge
        [(2, 0)]
        >>> wanted({(-1, 0): 3.0, (0, 0): 1.0, (1, 0): 2.0}, seeds=2)
        [(-1, 1), (0, 1), (1, 1)]
        >>> wanted({(-1, 0): 3.0, (0, 0): 1.0, (1, 0): 2.0}, seeds=2, seeds_around=1)
        [(0, 1)]
    """
    if not sweep:
        return [(0, seed) for seed in range(seeds) if (0, seed) not in results]
    first = [(k, 0) for k in (-1, 0, 1) if (k, 0) not in results]
    if first:
        return first
    best = best_rate(results)
    if math.isinf(at_rate(results, best)):  # lower rates may be better, if any is good
        return [(best - 1, 0)] if best > -MOST_HALVINGS else []
    around = (best - 1, best, best + 1)
    further = [(k, 0) for k in around if (k, 0) not in results]
    enough = {k: seeds if k == best else seeds_around or seeds for k in around}
    return further or [(k, seed) for k in around for seed in range(enough[k]) if (k, seed) not in results]


def best_rate(results: Mapping[Trial, float]) -> int:
    """The learning rate with the lowest loss, mean over the seeds; of equal ones the lowest."""
    return min(sorted({k for k, _ in results}), key=lambda k: at_rate(results, k))


def at_rate(results: Mapping[Trial, float], k: int) -> float:
    """The mean loss at a learning rate."""
    return mean(loss for (other, _), loss in results.items() if other == k)


class Comparison:
    """All runs, those made and those to make.

    Args:
        out: the directory that holds them.
        contestants: what is compared.
        seeds: how many seeds each best learning rate is tried with.
        common: further arguments of `launch/train.py`, the same for every run.
        sweep: whether to look for the best learning rate, or to take the one that the sweep would start from.
        seeds_around: how many seeds half of that rate and twice of it are tried with; ``None``: as many.
    """

    def __init__(
        self,
        out: Path,
        contestants: Sequence[Contestant],
        seeds: int,
        common: Sequence[str],
        sweep: bool = True,
        seeds_around: int | None = None,
    ) -> None:
        self.out, self.contestants, self.seeds, self.common = out, contestants, seeds, tuple(common)
        self.sweep, self.seeds_around = sweep, seeds_around
        out.mkdir(parents=True, exist_ok=True)
        self.records: dict[str, dict[str, Any]] = {each["run"]: each for each in records.read(out / RESULTS)}

    def arguments(self, contestant: Contestant, trial: Trial) -> tuple[str, ...]:
        """The arguments of `launch/train.py` for one run."""
        k, seed = trial
        return (*contestant.arguments, "--lr", f"{contestant.start * 2.0**k:g}", "--seed", str(seed), *self.common)

    def record(self, contestant: Contestant, trial: Trial) -> dict[str, Any] | None:
        """What came of one run; ``None``: it has not been made."""
        return self.records.get(" ".join(self.arguments(contestant, trial)))

    def results(self, contestant: Contestant) -> dict[Trial, float]:
        """The final losses of a contestant, in bits per byte."""
        trials = ((k, seed) for k in range(-20, 21) for seed in range(self.seeds))
        made = ((trial, self.record(contestant, trial)) for trial in trials)
        return {trial: math.inf if r["bits"] is None else r["bits"] for trial, r in made if r is not None}

    def wanted(self, contestant: Contestant) -> list[Trial]:
        """Which of its runs are still to be made."""
        return wanted(self.results(contestant), self.seeds, self.sweep, self.seeds_around)

    def folder(self, contestant: Contestant, trial: Trial) -> Path:
        """Where one run writes: a folder for each set of arguments."""
        rate = f"{contestant.start * 2.0 ** trial[0]:g}"
        common = hashlib.sha256(" ".join(self.common).encode()).hexdigest()[:8]
        return self.out / "runs" / f"{contestant.model}-{contestant.name}-lr{rate}-seed{trial[1]}-{common}"

    def run(self, contestant: Contestant, trial: Trial) -> dict[str, Any]:
        """Make one run.

        Raises:
            UserError: it failed, other than by training that came to nothing.
        """
        arguments, folder = self.arguments(contestant, trial), self.folder(contestant, trial)
        command = [sys.executable, str(Path(__file__).parents[1] / "train.py"), *arguments]
        command += ["--out", str(folder), "--overwrite"]
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        done = output(command, environment)
        record = {"run": " ".join(arguments), "bits": None, "bytes_per_parameter": None}
        if done.returncode == 0:
            final = records.read(folder / METRICS)[-1]
            parameters = json.loads((folder / CONFIG).read_text())["parameters"]
            record["bits"] = final["validation_bits_per_byte"]
            record["bytes_per_parameter"] = final["state_bytes_per_rank"] / parameters
        elif "; pass a lower --lr than " not in done.stderr:
            raise UserError(f"launch/train.py {' '.join(arguments)} failed:\n{done.stderr.strip()}")
        return record

    def run_all(self, jobs: int, console: Console) -> None:
        """Make all runs that are wanted, ``jobs`` at a time.

        Raises:
            UserError, OSError: one failed, or could not be kept. No more are begun then; what comes of others is kept.
        """
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        with ThreadPoolExecutor(jobs) as pool, progress:
            bar = progress.add_task("runs", total=None)
            running: dict[Future[dict[str, Any]], tuple[Contestant, Trial]] = {}
            failed: Exception | None = None
            while True:
                todo = [(c, trial) for c in self.contestants for trial in self.wanted(c)]
                for job in todo if failed is None else ():
                    if job not in running.values() and len(running) < jobs:
                        running[pool.submit(self.run, *job)] = job
                made = sum(len(self.results(c)) for c in self.contestants)
                progress.update(bar, completed=made, total=made + len(todo))
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    try:
                        self.keep(future.result())
                    except (UserError, OSError) as error:
                        failed = failed or error
                        continue
                    console.print(self.line(*job), highlight=False, soft_wrap=True)
        if failed is not None:
            raise failed

    def keep(self, record: dict[str, Any]) -> None:
        """Remember what came of a run, here and in the directory."""
        self.records[record["run"]] = record
        records.append(self.out / RESULTS, record)

    def line(self, contestant: Contestant, trial: Trial) -> str:
        """One run in a line."""
        record = self.record(contestant, trial)
        assert record is not None
        bits = "came to nothing" if record["bits"] is None else f"{record['bits']:.4f} bits per byte"
        rate = contestant.start * 2.0 ** trial[0]
        return f"{contestant.model} {contestant.name} lr {rate:g} seed {trial[1]}: {bits}"

    def bytes_per_parameter(self, contestant: Contestant) -> float:
        """Of optimizer state."""
        record = self.record(contestant, (self.best(contestant)[1], 0))
        return float((record and record["bytes_per_parameter"]) or math.nan)

    def best(self, contestant: Contestant) -> tuple[dict[Trial, float], int]:
        """Its results, and its best learning rate; without a sweep the default one."""
        results = self.results(contestant)
        return results, best_rate(results) if self.sweep else 0

    def curve(self, contestant: Contestant) -> tuple[list[int], list[float]]:
        """Training loss by step at the best learning rate, mean over the seeds."""
        results, best = self.best(contestant)
        runs = [trained(self.folder(contestant, (k, seed))) for k, seed in results if k == best]
        return [r["step"] for r in runs[0]], [
            mean(r["train_bits_per_byte"] for r in same_step) for same_step in zip(*runs, strict=False)
        ]


def trained(folder: Path) -> list[dict[str, Any]]:
    """The logged steps of one run."""
    return [record for record in records.read(folder / METRICS) if "train_bits_per_byte" in record]
