"""Time and memory of planning a step for large models on many ranks, none of which exist.

One process plans for rank 1 of a fake process group; parameters have shapes and no memory. What is measured is all that
the first step does before it updates anything, but for the comparison of plans across ranks.
"""

from __future__ import annotations

import argparse
import gc
import time
import tracemalloc
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from launch.benchmarks.arguments import count
from sm3_dist import SM3
from sm3_dist.ranks.bucket import MaxBucket

Shape = tuple[int, ...]


def llama(layers: int, width: int, keys: int, hidden: int) -> list[Shape]:
    """The parameters of a decoder: ``keys`` is the width of keys and values, ``hidden`` that of the MLP."""
    attention = [(width, width), (keys, width), (keys, width), (width, width)]
    block = [*attention, (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return [(32000, width), *block * layers, (width,), (32000, width)]


MODELS = {"7b": llama(32, 4096, 4096, 11008), "70b": llama(80, 8192, 1024, 28672)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="default: all")
    parser.add_argument("--ranks", type=count, nargs="+", default=[8, 64, 512, 4096], help="default: 8 64 512 4096")


def run(options: argparse.Namespace) -> None:
    """Measure, and print a Markdown table."""
    print("| model | ranks | tensors | planning | memory of the plan | elements in the all-reduce |")
    print("|:--|--:|--:|--:|--:|--:|")
    for model in options.models:
        for ranks in options.ranks:
            seconds, memory, shared = plan(MODELS[model], ranks)
            print(f"| {model} | {ranks} | {len(MODELS[model])} | {seconds:.2f} s | {memory / 1e6:.1f} MB | {shared} |")


def plan(shapes: list[Shape], ranks: int) -> tuple[float, int, int]:
    """Seconds, bytes of Python objects, and elements of the all-reduce. The time is that of a plan without tracing."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=ranks)
    try:
        params = sharded(shapes, ranks)
        with patch("sm3_dist.step.keeper.check_agreement", new=lambda *_: {tuple(range(ranks)): "agreed"}):
            SM3(params)._current_plan()  # what is imported and cached once
            gc.collect()
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            kept = SM3(params)._current_plan()
            memory = tracemalloc.get_traced_memory()[0] - before
            tracemalloc.stop()
            optimizer = SM3(params)
            start = time.perf_counter()
            optimizer._current_plan()
            seconds = time.perf_counter() - start
        return seconds, memory, sum(bucket.numel for bucket in kept.buckets if isinstance(bucket, MaxBucket))
    finally:
        dist.destroy_process_group()


def sharded(shapes: list[Shape], ranks: int) -> list[Tensor]:
    """Parameters as FSDP2 leaves them: the first dimension cut into one chunk per rank."""
    mesh = init_device_mesh("cpu", (ranks,))
    params: list[Tensor] = []
    for shape in shapes:
        chunk = -(-shape[0] // ranks)
        rows = max(0, min(chunk, shape[0] - chunk))  # rank 1
        local = torch.empty((rows, *shape[1:]), device="meta")
        stride = torch.empty(shape, device="meta").stride()
        whole = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)
        params.append(torch.nn.Parameter(whole))
    return params
