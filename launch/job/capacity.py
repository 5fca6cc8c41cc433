"""Capacity: whether this machine has the memory that a run needs at least, asked before anything is built."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

import torch

from launch.job.model import PRESETS
from launch.job.options import Options
from launch.job.parallel import WRAPPED_WHOLE, ranks_per_copy, strategy
from launch.job.recipe import chosen
from launch.job.settings import Settings
from launch.job.world import UserError, World
from sm3_dist.planner.tables import size

# The limit of a container, and what it uses but for the files that the kernel keeps; control groups 2 and 1.
LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.stat", "anon"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.stat", "total_rss"),
)
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def check(options: Options, settings: Settings, world: World, device: torch.device, parameters: int) -> None:
    """Compare what this machine's ranks will hold with what is free.

    Weights, gradients and what the optimizer keeps for each element are counted; activations, gathered weights and the
    rest come on top, so what passes here may still be too large. Of activations only the last are looked at: the scores
    of all bytes that may come next.

    Raises:
        UserError: it cannot fit.
    """
    free = available(device)
    ranks = 1 if device.type == "cuda" else world.local_size  # each has a GPU to itself
    parts = {name: ranks * count for name, count in least_bytes(options, settings, world, parameters).items()}
    needed = sum(parts.values())
    if free is not None and needed > free:
        where = str(device) if device.type == "cuda" else f"the {ranks} process(es) on this machine"
        raise UserError(
            f"--model {options.model} needs at least {size(needed)} on {where} "
            f"({', '.join(f'{name} {size(count)}' for name, count in parts.items())}), and {size(free)} are free; pass "
            "a smaller --model, add machines, or hold less per parameter: --dtype bfloat16 --momentum-dtype int8 "
            "--step-in-backward"
        )
    scores = PRESETS[options.model].vocabulary * options.seq_len * BYTES[options.dtype]  # of a sequence
    scores *= math.ceil(options.batch_size / world.size) * ranks
    if free is not None and scores > free:
        raise UserError(
            f"--batch-size {options.batch_size} with --seq-len {options.seq_len} needs at least {size(scores)} on this "
            f"machine for what the model says of each next byte, and {size(free)} are free; pass a smaller one"
        )


def least_bytes(options: Options, settings: Settings, world: World, parameters: int) -> dict[str, float]:
    """What each rank holds at the least, in bytes."""
    way = strategy(options, world)
    element = BYTES[options.dtype]
    held = element * parameters / ranks_per_copy(options, world)
    moments = chosen(options).moments
    if options.optimizer == "sm3":
        moments = BYTES[settings.momentum_dtype or "float32"] / element if settings.momentum else 0
    state = moments * held / (world.size if way in ("zero1", "oss") else 1)
    gradients = 0 if options.step_in_backward else held
    if way in WRAPPED_WHOLE and element * parameters > held + gradients + state:
        return {"weights, which are whole when they are wrapped,": element * parameters}
    return {"weights": held, "gradients": gradients, "optimizer state": state}


def available(device: torch.device) -> int | None:
    """Bytes that are free on this machine, or on this rank's GPU; ``None`` where nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    left = [limit_of_container(*files) for files in LIMITS]
    with suppress(OSError, StopIteration):
        left.append(1024 * read("/proc/meminfo", "MemAvailable:"))
    return min((each for each in left if each is not None), default=None)


def limit_of_container(limit: str, used: str, name: str) -> int | None:
    """Bytes that a container may still take; ``None`` if there is no limit, or no such version of control groups."""
    with suppress(OSError, ValueError, StopIteration):  # ValueError: the limit is "max"
        return int(Path(limit).read_text()) - read(used, name)
    return None


def read(file: str, name: str) -> int:
    """The number after a name at the start of a line."""
    lines = map(str.split, Path(file).read_text().splitlines())
    return next(int(words[1]) for words in lines if words[0] == name)
