"""Time of one step on whole tensors, beside other optimizers and the pass over memory that no step can beat.

All contenders step the same weights with the same gradients in one process, and take turns, so that what else the
machine does hits all of them alike. A step of SM3 without momentum must read the gradient and read and write the
weight. The recipe is ``SM3.adamw_like``.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from launch.benchmarks.arguments import count
from launch.benchmarks.clocks import CLOCKS, Clock, Step, Times, bandwidth, name_of
from launch.benchmarks.contenders import LR, REFERENCES, Make, contenders, state_bytes
from launch.benchmarks.shapes import MODELS, Shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIMIT = "limit: w -= lr * g"


@dataclass
class Figures:
    """What is measured of one contender.

    Attributes:
        times: of each step.
        first: of the first, in which kernels are compiled and states are made.
        state: bytes of its state.
        extra: bytes that a step takes for itself; ``None`` where nobody tells.
    """

    first: Times
    state: int
    extra: int | None
    times: list[Times] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(each.whole for each in self.times)

    @property
    def host(self) -> float:
        """Seconds until the host may go on."""
        return statistics.median(each.host for each in self.times)

    @property
    def device(self) -> float:
        """Seconds of a step that the host has launched by the time that the device begins with it."""
        return statistics.median(each.device for each in self.times)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    usual = [name for name in MODELS if name not in ("decoder", "tiny")]
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default: cpu")
    parser.add_argument("--models", nargs="+", default=usual, choices=list(MODELS), help=f"default: {' '.join(usual)}")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=list(DTYPES), help="default: float32")
    parser.add_argument("--threads", type=count, nargs="+", default=[2], help="default: 2")
    parser.add_argument("--rounds", type=count, default=15, help="steps of each contender (default: 15)")
    parser.add_argument("--only", nargs="+", help="contenders whose name begins so; the first three are always there")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time of all threads, which tells more on a machine that others use (default: wall; "
        "on a GPU its own events)",
    )
    parser.add_argument("--json", type=Path, help="write all times, in seconds, to this file")


def run(options: argparse.Namespace) -> None:
    """Measure, and print Markdown tables."""
    if options.json:
        options.json.write_text("[]")  # that it cannot be written is known before anything is measured
    clock = CLOCKS["gpu" if options.device == "cuda" else options.clock]()
    speed = bandwidth(clock, options.device)
    print(f"{name_of(options.device)}, PyTorch {torch.__version__}; a copy moves {speed / 1e9:.0f} GB/s", flush=True)
    results = []
    for model in options.models:
        for dtype in options.dtypes:
            for threads in options.threads:
                torch.set_num_threads(threads)
                shapes = MODELS[model]()
                makers = contenders(options.device, DTYPES[dtype], options.only)
                figures = measure(shapes, DTYPES[dtype], options.device, options.rounds, makers, clock)
                setting = {"model": model, "dtype": dtype, "threads": threads, "device": options.device}
                numel = sum(torch.Size(shape).numel() for shape in shapes)
                moved = 3 * DTYPES[dtype].itemsize * numel
                print(
                    f"\n{model}, {numel / 1e6:,.1f} M parameters, {dtype}, {threads} threads, median of "
                    f"{options.rounds} rounds; to read gradients and weights and to write weights takes "
                    f"{1e3 * moved / speed:.2f} ms at the speed of a copy\n"
                )
                print(table(figures, numel, options.device == "cuda"), flush=True)
                results += [setting | as_json(name, each) for name, each in figures.items()]
                if options.json:
                    options.json.write_text(json.dumps(results, indent=1))


def measure(
    shapes: Sequence[Shape], dtype: torch.dtype, device: str, rounds: int, makers: dict[str, Make], clock: Clock
) -> dict[str, Figures]:
    """Let each contender take its steps."""
    torch.manual_seed(0)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    weights, grads = (torch.randn(sum(sizes), device=device).mul_(0.02).to(dtype) for _ in range(2))
    params: list[Tensor] = []
    for shape, weight, grad in zip(shapes, weights.split(sizes), grads.split(sizes), strict=True):
        params.append(torch.nn.Parameter(weight.view(shape)))
        params[-1].grad = grad.view(shape)
    with torch.no_grad():
        steps: dict[str, Step] = {LIMIT: lambda: weights.add_(grads, alpha=-LR)}
        figures = {LIMIT: Figures(clock.time(steps[LIMIT]), 0, clock.extra_bytes(steps[LIMIT]))}
        for name, make in makers.items():
            optimizer = make(params)
            steps[name] = optimizer.step
            first = clock.time(optimizer.step)
            figures[name] = Figures(first, state_bytes(optimizer), clock.extra_bytes(optimizer.step))
        gc.collect()
        for _ in range(rounds):
            for name, step in steps.items():
                figures[name].times.append(clock.time(step))
    return figures


def as_json(name: str, each: Figures) -> dict[str, object]:
    """All that was measured, in seconds and bytes."""
    wholes, hosts, devices = (list(column) for column in zip(*each.times, strict=True))
    measured = {"seconds": wholes, "host_seconds": hosts, "device_seconds": devices, "first_seconds": each.first.whole}
    return {"name": name, "state_bytes": each.state, "extra_bytes": each.extra} | measured


def table(figures: dict[str, Figures], numel: int, with_host: bool) -> str:
    """One line for each contender, in Markdown.

    Args:
        figures: what was measured.
        numel: number of parameters.
        with_host: whether the host may go on before a step is done. "host ahead" is then the time of a step that is
            launched while the device is busy, as after a backward pass.
    """
    columns = ["step", "fastest", *(["host"] if with_host else []), "first step"]
    columns += [f"x {name}" for name in REFERENCES]
    columns += ["host ahead", *(f"x {name}" for name in REFERENCES)] if with_host else []
    columns += ["state per parameter", "memory of a step"]
    lines = [f"| | {' | '.join(columns)} |", "|:--" + "|--:" * len(columns) + "|"]
    for name, each in figures.items():
        times = [each.median, min(time.whole for time in each.times), *([each.host] if with_host else [])]
        cells = [in_milliseconds(seconds) for seconds in [*times, each.first.whole]]
        cells += [f"{each.median / figures[other].median:.2f}" for other in REFERENCES]
        if with_host:
            cells += [in_milliseconds(each.device)]
            cells += [f"{each.device / figures[other].device:.2f}" for other in REFERENCES]
        cells.append(f"{each.state / numel:.2f} bytes" if name != LIMIT else "")
        cells.append("" if each.extra is None else f"{each.extra / 1e6:.1f} MB")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def in_milliseconds(seconds: float) -> str:
    """A time as the tables have it."""
    return f"{1e3 * seconds:.{2 if seconds > 1e-3 else 3}f} ms"
