"""Small runs of `launch/train.py` within a worker."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from chaos import tensors
from rich.console import Console

from launch.job.command_line import parse
from launch.job.world import World
from launch.train import Run

FAST = "--model tiny --steps 8 --batch-size 4 --seq-len 16 --lr 0.01 --schedule cosine --held-out-bytes 500"


class Interrupted(Exception):
    """Stands for whatever ends a run."""


def job(
    arguments: str, text: Path, out: Path, stop: int | None = None, before: Callable[[Run], None] | None = None
) -> str:
    """Train, up to step ``stop`` if one is given; return what was said."""
    console = Console(file=io.StringIO(), width=1000)
    run = Run(
        parse([*f"{FAST} --device cpu {arguments}".split(), "--data", str(text), "--out", str(out)]),
        World.current(),
        console,
    )
    if before is not None:
        before(run)
    take_step = run.take_step

    def step_or_stop(*batch: Any) -> Any:
        if run.state.step == stop:
            raise Interrupted
        return take_step(*batch)

    run.take_step = step_or_stop  # type: ignore[method-assign,assignment]
    try:
        run.learn()
    except Interrupted:
        run.checkpoints.finish()
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def same(first: Path, second: Path) -> bool:
    """Whether two runs ended with the same weights and the same state, to the last bit."""
    one, other = (tensors(out / "checkpoints" / "step-00000008") for out in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
