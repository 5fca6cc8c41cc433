"""Time of one step on whole tensors, beside other optimizers and the pass over memory that no step can beat.

All contenders step the same weights with the same gradients in one process, and take turns, so that what else the
machine does hits all of them alike. A step of SM3 without momentum must read the gradient and read and write the
weight. The recipe is ``SM3.adamw_like``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adafactor, AdamW

from sm3_dist import SM3, kernels

LR = 1e-6  # weights hardly move, however many steps are measured
Shape = tuple[int, ...]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LIMIT = "limit: w -= lr * g"


def gpt2() -> list[Shape]:
    """The 124 M parameters of GPT-2."""
    d = 768
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(50257, d), (1024, d), *block * 12, (d,), (d,)]


def resnet50() -> list[Shape]:
    """The convolutions of ResNet-50."""
    shapes: list[Shape] = [(64, 3, 7, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            shapes += [(4 * width, inputs, 1, 1)] if block == 0 else []
            inputs = 4 * width
    return shapes


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "gpt2": gpt2,
    "small": lambda: [(64, 64)] * 2000,
    "embedding": lambda: [(50257, 768)],
    "resnet50": resnet50,
}


def contenders(params: list[Tensor], weights: Tensor, grads: Tensor) -> dict[str, Callable[[], Any]]:
    """By name what takes a step."""
    steps: dict[str, Callable[[], Any]] = {LIMIT: lambda: weights.add_(grads, alpha=-LR)}
    steps["SGD(fused)"] = SGD(params, LR, fused=True).step
    steps["AdamW(fused)"] = AdamW(params, LR, fused=True).step
    steps["AdamW(foreach)"] = AdamW(params, LR, foreach=True).step
    steps["Adafactor"] = Adafactor(params, LR).step
    for backend in ("c", "eager"):
        if kernels.available()[backend] is None:
            steps[f"SM3, {backend}"] = SM3(params, LR, backend=backend).step
            steps[f"SM3, {backend}, momentum"] = SM3(params, LR, momentum=0.9, backend=backend).step
            narrow = SM3(params, LR, momentum=0.9, momentum_dtype=torch.bfloat16, backend=backend)
            steps[f"SM3, {backend}, bfloat16 momentum"] = narrow.step
            steps[f"recipe, {backend}"] = SM3.adamw_like(params, LR, backend=backend).step
            guarded = SM3.adamw_like(params, LR, skip_nonfinite="parameter", backend=backend)
            steps[f"recipe, {backend}, skip_nonfinite"] = guarded.step
            guarded = SM3(params, LR, momentum=0.9, skip_nonfinite="parameter", backend=backend)
            steps[f"SM3, {backend}, momentum, skip_nonfinite"] = guarded.step
            narrow = SM3.adamw_like(params, LR, momentum_dtype=torch.bfloat16, backend=backend)
            steps[f"recipe, {backend}, bfloat16 momentum"] = narrow.step
            narrowest = SM3.adamw_like(
                params, LR, momentum_dtype=torch.int8, stochastic_rounding=True, rounding_seed=0, backend=backend
            )
            steps[f"recipe, {backend}, 8-bit momentum, stochastic rounding"] = narrowest.step
    for name, module in (("torch-SM3", "SM3"), ("pytorch_optimizer SM3", "pytorch_optimizer")):
        if importlib.util.find_spec(module) is not None:
            steps[name] = importlib.import_module(module).SM3(params, LR).step
    return steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=list(DTYPES))
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="default: 2")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each contender (default: 15)")
    parser.add_argument("--only", nargs="+", help="contenders whose name begins so; the first two are always there")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=list(CLOCKS),
        help="cpu: processor time of all threads, which tells more on a machine that others use (default: wall)",
    )
    parser.add_argument("--json", type=Path, help="write all times, in seconds, to this file")


def run(options: argparse.Namespace) -> None:
    """Measure, and print Markdown tables."""
    results = []
    for model in options.models:
        for dtype in options.dtypes:
            for threads in options.threads:
                torch.set_num_threads(threads)
                times, extra = measure(
                    MODELS[model](), DTYPES[dtype], options.rounds, options.only, CLOCKS[options.clock]
                )
                print(
                    f"\n{model}, {dtype}, {threads} threads, median of {options.rounds} rounds, {options.clock} clock\n"
                )
                show(times, extra)
                setting = {"model": model, "dtype": dtype, "threads": threads}
                results += [{**setting, "name": n, "seconds": t, "extra_bytes": extra[n]} for n, t in times.items()]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def measure(
    shapes: Sequence[Shape], dtype: torch.dtype, rounds: int, only: Sequence[str] | None, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], dict[str, int | None]]:
    """Seconds of every step of each contender, and the memory that a step takes for itself."""
    torch.manual_seed(0)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    weights, grads = (torch.randn(sum(sizes)).mul_(0.02).to(dtype) for _ in range(2))
    params: list[Tensor] = []
    for shape, weight, grad in zip(shapes, weights.split(sizes), grads.split(sizes), strict=True):
        params.append(torch.nn.Parameter(weight.view(shape)))
        params[-1].grad = grad.view(shape)
    with torch.no_grad():
        steps = contenders(params, weights, grads)
        if only:
            kept = (LIMIT, "SGD(fused)", "AdamW(fused)", *only)
            steps = {name: step for name, step in steps.items() if name.startswith(tuple(kept))}
        for step in steps.values():  # makes the state
            step()
        extra = {name: extra_bytes(step) for name, step in steps.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                start = clock()
                step()
                times[name].append(clock() - start)
    return times, extra


def extra_bytes(step: Callable[[], Any]) -> int | None:
    """How far a step raises the resident memory of the process while it runs; ``None`` where Linux does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        step()
        return max(0, resident("VmHWM") - before)
    except OSError:
        return None


def resident(field: str) -> int:
    """A field of the process status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def show(times: dict[str, list[float]], extra: dict[str, int | None]) -> None:
    """Print one table."""
    median = {name: statistics.median(each) for name, each in times.items()}
    print("| | step | fastest | x SGD(fused) | x AdamW(fused) | memory of a step |\n|:--|--:|--:|--:|--:|--:|")
    for name, each in times.items():
        ratios = [f"{median[name] / median[other]:.2f}" for other in ("SGD(fused)", "AdamW(fused)")]
        memory = extra[name]
        shown = "" if memory is None else f"{memory / 1e6:.1f} MB"
        print(f"| {name} | {1e3 * median[name]:.2f} ms | {1e3 * min(each):.2f} ms | {' | '.join(ratios)} | {shown} |")
