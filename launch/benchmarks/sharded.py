"""The step of sharded models beside AdamW's, what it sends, and how much of its all-reduce compute hides.

Each rank is a process with one thread. The all-reduce of maxima is delayed on purpose, as a slow network would, by a
share of the time that forward and backward take; what an iteration then takes longer is what is exposed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.multiprocessing.spawn import spawn
from torch.optim import AdamW, Optimizer

from launch.benchmarks.arguments import count
from launch.job.leaving import leave
from launch.job.model import GPT, PRESETS, Block
from sm3_dist import SM3
from sm3_dist.ranks import bucket as sm3_bucket

LR, CONTEXT = 1e-4, 64


def fsdp2(model: GPT) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module)
    fully_shard(model)
    return model


def fsdp1(model: GPT) -> nn.Module:
    return FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy({Block}), device_id=torch.device("cpu"), use_orig_params=True
    )


WRAPPERS: dict[str, Callable[[GPT], nn.Module]] = {"fsdp2": fsdp2, "fsdp1": fsdp1}


class Late:
    """A collective that is not done before a delay has passed."""

    def __init__(self, work: dist.Work, delay: float) -> None:
        self.work, self.due = work, time.perf_counter() + delay

    def wait(self, *timeout: timedelta) -> None:
        time.sleep(max(0.0, self.due - time.perf_counter()))
        self.work.wait(*timeout)

    def is_completed(self) -> bool:
        return self.work.is_completed()


class Network:
    """Stands in for ``torch.distributed`` in the buckets: counts what is sent, and delays it."""

    def __init__(self) -> None:
        self.delay, self.collectives, self.bytes = 0.0, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_reduce(self, tensor: torch.Tensor, **options: Any) -> Late:
        self.collectives += 1
        self.bytes += tensor.numel() * tensor.element_size()
        return Late(dist.all_reduce(tensor, **options), self.delay)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.add_argument("--model", default="small", choices=list(PRESETS), help="default: small")
    parser.add_argument("--ranks", type=count, nargs="+", default=[2, 4], help="default: 2 4")
    parser.add_argument("--steps", type=count, default=15, help="iterations of each kind (default: 15)")


def run(options: argparse.Namespace) -> None:
    """Measure, and print a Markdown table."""
    print("| wrapper | ranks | AdamW step | SM3 step | collectives | sent | forward+backward | iteration ", end="")
    print("| delayed by half of that | delayed by twice that |\n|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for wrapper in WRAPPERS:
        for size in options.ranks:
            with tempfile.TemporaryDirectory() as directory:
                spawn(work, (size, wrapper, options.model, options.steps, Path(directory)), nprocs=size)
                f = torch.load(Path(directory, "figures"))
            times = [f"{1e3 * f[key]:.1f} ms" for key in ("compute", "delay 0", "delay 0.5", "delay 2")]
            steps = f"{1e3 * f['AdamW']:.2f} ms | {1e3 * f['SM3']:.2f} ms | {f['collectives']:.0f}"
            print(f"| {wrapper} | {size} | {steps} | {f['bytes']:.0f} bytes | {' | '.join(times)} |", flush=True)


def work(rank: int, size: int, wrapper: str, name: str, steps: int, directory: Path) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=size)
    network = Network()
    with patch.object(sm3_bucket, "dist", network):
        figures = measure(wrapper, name, steps, network)
    if rank == 0:
        torch.save(figures, Path(directory, "figures"))
    dist.barrier()
    dist.destroy_process_group()
    leave(0)


def measure(wrapper: str, name: str, steps: int, network: Network) -> dict[str, float]:
    """Medians over the steps, in seconds."""
    torch.manual_seed(0)
    model = WRAPPERS[wrapper](GPT(PRESETS[name], CONTEXT))
    text = torch.randint(0, 256, (4, CONTEXT))
    sm3 = SM3(model.parameters(), LR, model=model)
    optimizers: dict[str, Optimizer] = {"SM3": sm3, "AdamW": AdamW(model.parameters(), LR, foreach=True)}

    def compute() -> float:
        start = time.perf_counter()
        model(text).float().square().mean().backward()
        return time.perf_counter() - start

    seconds: dict[str, list[float]] = {key: [] for key in ("compute", *optimizers)}
    for _ in range(steps + 1):
        seconds["compute"].append(compute())
        for key, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            seconds[key].append(time.perf_counter() - start)
        sm3.state  # noqa: B018  # the maxima have arrived before the next kind of step
        sm3.zero_grad()
    figures = {key: statistics.median(each[1:]) for key, each in seconds.items()}
    agreed = torch.tensor(figures["compute"])
    dist.all_reduce(agreed)
    delay = agreed.item() / dist.get_world_size()
    sent = network.collectives, network.bytes
    iterations: dict[float, list[float]] = {0.0: [], 0.5: [], 2.0: []}
    for factor in [factor for _ in range(steps) for factor in iterations]:  # they take turns
        network.delay = factor * delay
        sm3.step()
        start = time.perf_counter()
        compute()
        sm3.step()  # waits for what was sent before
        iterations[factor].append(time.perf_counter() - start)
        sm3.zero_grad()
        network.delay = 0.0
        sm3.state  # noqa: B018
    for factor, each in iterations.items():
        figures[f"delay {factor:g}"] = statistics.median(each)
    figures["collectives"], figures["bytes"] = (each / (steps + 1) for each in sent)
    return figures
