"""Sharded optimizer state under plain data parallelism, side by side with what others offer.

Every rank holds the parameters and the same gradients, as DistributedDataParallel leaves them; what is measured is
`optimizer.step()`, after which every rank has every new weight. The contenders work on the same tensors and take turns,
so that what else the machine does hits all of them alike.
"""

from __future__ import annotations

import argparse
import os
import socket
import stat
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.multiprocessing.spawn import spawn
from torch.optim import AdamW, Optimizer

from launch.benchmarks.arguments import count
from launch.job.leaving import leave
from launch.job.model import GPT, PRESETS
from launch.job.recipe import count_bytes
from sm3_dist import SM3

LR, MOMENTUM, BETA = 1e-3, 0.9, 0.95
WARM_UP = 2  # steps of each contender that do not count


def ours(params: list[Tensor]) -> Optimizer:
    return SM3(params, LR, MOMENTUM, BETA, shard_over=dist.group.WORLD, check_gradients=0)


def zero_adamw(params: list[Tensor]) -> Optimizer:
    return ZeroRedundancyOptimizer(params, AdamW, lr=LR, betas=(MOMENTUM, BETA), fused=True)


def zero_sm3(params: list[Tensor]) -> Optimizer:
    return ZeroRedundancyOptimizer(params, SM3, lr=LR, momentum=MOMENTUM, beta=BETA)


def oss_sm3(params: list[Tensor]) -> Optimizer:
    from fairscale.optim import OSS

    return OSS(params, SM3, lr=LR, momentum=MOMENTUM, beta=BETA)  # type: ignore[no-any-return]


CONTENDERS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "SM3(shard_over=group)": ours,
    "ZeroRedundancyOptimizer(AdamW)": zero_adamw,
    "ZeroRedundancyOptimizer(SM3)": zero_sm3,
    "fairscale OSS(SM3)": oss_sm3,
}


@dataclass(frozen=True)
class Figures:
    """What one rank measured of one contender: bytes of state, bytes sent per step, and seconds of each step."""

    state: int
    sent: float
    seconds: list[float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.add_argument("--model", default="gpt2", choices=list(PRESETS), help="whose parameters (default: gpt2)")
    parser.add_argument("--ranks", type=count, nargs="+", default=[2, 4], help="numbers of gloo ranks (default: 2 4)")
    parser.add_argument("--steps", type=count, default=10, help="steps of each contender (default: 10)")


def run(options: argparse.Namespace) -> None:
    """Measure, and print a Markdown table."""
    print(f"| ranks | optimizer of the {options.model} model | state per rank | sent per rank and step | step |")
    print("|--:|:--|--:|--:|--:|")
    for size in options.ranks:
        for name, figures in measure(size, options.model, options.steps).items():
            state = max(each.state for each in figures) / 1e6
            sent = max(each.sent for each in figures) / 1e6
            seconds = [max(step) for step in zip(*(each.seconds for each in figures), strict=True)]
            step = f"{1e3 * statistics.median(seconds):.0f} ms ({1e3 * min(seconds):.0f})"
            print(f"| {size} | {name} | {state:.1f} MB | {sent:.1f} MB | {step} |", flush=True)


def measure(size: int, model: str, steps: int) -> dict[str, list[Figures]]:
    """Start ``size`` ranks and return what each of them measured, by contender."""
    with tempfile.TemporaryDirectory() as directory:
        spawn(work, (size, model, steps, Path(directory)), nprocs=size)
        ranks = [torch.load(Path(directory, str(rank)), weights_only=False) for rank in range(size)]
    return {name: [figures[name] for figures in ranks] for name in CONTENDERS}


def work(rank: int, size: int, model: str, steps: int, directory: Path) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=size)
    torch.manual_seed(0)
    params: list[Tensor] = list(GPT(PRESETS[model], 1024).parameters())
    for param in params:
        param.grad = torch.randn_like(param)
    torch.save(compare(params, steps), Path(directory, str(rank)))
    dist.barrier()
    dist.destroy_process_group()
    leave(0)


def compare(params: list[Tensor], steps: int) -> dict[str, Figures]:
    """Let the contenders take turns."""
    optimizers = {name: make(params) for name, make in CONTENDERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    sent = dict.fromkeys(optimizers, 0)
    for _ in range(WARM_UP + steps):
        for name, optimizer in optimizers.items():
            dist.barrier()
            before, start = bytes_sent(), time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - start)
            settle(optimizer)
            sent[name] = bytes_sent() - before
    return {
        name: Figures(count_bytes(local_state(optimizer)), sent[name], seconds[name][WARM_UP:])
        for name, optimizer in optimizers.items()
    }


def local_state(optimizer: Optimizer) -> dict[Any, Any]:
    """The state that this rank holds."""
    return dict(getattr(optimizer, "optim", optimizer).state)  # where a wrapper keeps it; reading SM3's waits


def settle(optimizer: Optimizer) -> None:
    """Let what travels after the step arrive."""
    local_state(optimizer)


def bytes_sent() -> int:
    """Bytes that this process has sent through its TCP connections, as the kernel counts them (``tcpi_bytes_sent``)."""
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        if is_socket(int(descriptor)):
            with socket.socket(fileno=os.dup(int(descriptor))) as connection:
                if connection.type == socket.SOCK_STREAM and connection.family != socket.AF_UNIX:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
                    total += struct.unpack_from("Q", info, 200)[0]
    return total


def is_socket(descriptor: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:  # the one through which the directory was listed
        return False
