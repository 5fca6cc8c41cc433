"""The step of SM3 with orthogonal updates beside torch.optim.Muon's: on one process, and sharded over several.

The matrices are those of some transformer layers, sharded with FSDP2. All contenders step in turns. Each rank is a
process with one thread; Muon takes whole tensors alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.optim import Muon

from launch.benchmarks.arguments import count
from launch.job.leaving import leave
from sm3_dist import SM3
from sm3_dist.step.param_groups import ADAMW_LIKE, MATRIX

LR = 1e-4
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.add_argument("--layers", type=count, default=2, help="default: 2")
    parser.add_argument("--width", type=count, default=512, help="default: 512")
    parser.add_argument("--ranks", type=count, nargs="+", default=[1, 2, 4], help="default: 1 2 4")
    parser.add_argument("--steps", type=count, default=9, help="steps of each kind (default: 9)")


def run(options: argparse.Namespace) -> None:
    """Measure, and print a Markdown table."""
    print("| ranks | | wall clock | processor time of a rank | sent by a rank |\n|--:|:--|--:|--:|--:|")
    for size in options.ranks:
        with tempfile.TemporaryDirectory() as directory:
            spawn(work, (size, options.layers, options.width, options.steps, Path(directory)), nprocs=size)
            figures = torch.load(Path(directory, "figures"))
        for name, (wall, processor, sent) in figures.items():
            shown = f"{1e3 * wall:.0f} ms | {1e3 * processor:.0f} ms | {sent / 1e6:.2f} MB"
            print(f"| {size} | {name} | {shown} |", flush=True)


def work(rank: int, size: int, layers: int, width: int, steps: int, directory: Path) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=size)
    figures = measure(layers, width, steps)
    if rank == 0:
        torch.save(figures, Path(directory, "figures"))
    dist.barrier()
    dist.destroy_process_group()
    leave(0)


def measure(layers: int, width: int, steps: int) -> dict[str, tuple[float, float, int]]:
    """For each contender the medians of both clocks over the steps, in seconds, and the bytes that this rank sends."""
    model = matrices(layers, width)
    alone = dist.get_world_size() == 1
    if not alone:
        fully_shard(model)
    optimizer = SM3(model.parameters(), LR, **ADAMW_LIKE | MATRIX)
    contenders: dict[str, Callable[[], Any]] = {"SM3, orthogonal": optimizer.step}
    if alone:
        contenders["torch.optim.Muon"] = Muon(model.parameters(), LR, adjust_lr_fn="match_rms_adamw").step
    for param in model.parameters():
        param.grad = 50 * param.detach()
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in contenders}
    for _ in range(steps + 1):
        for name, step in contenders.items():
            dist.barrier()
            before = [clock() for clock in CLOCKS.values()]
            step()
            times[name].append(tuple(clock() - b for clock, b in zip(CLOCKS.values(), before, strict=True)))
    sent = sum(sum(bucket.exchange.nbytes) for bucket in optimizer._current_plan().orthogonal.buckets)
    result = {}
    for name, each in times.items():
        wall, processor = (statistics.median(column) for column in zip(*each[1:], strict=True))
        result[name] = (wall, processor, sent)
    return result


def matrices(layers: int, width: int) -> nn.Module:
    """Of each layer query, key, value, output, and the two of the perceptron."""
    torch.manual_seed(0)
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    return nn.ParameterList(nn.Parameter(torch.randn(shape).mul_(0.02)) for _ in range(layers) for shape in shapes)
