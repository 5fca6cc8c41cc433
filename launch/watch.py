"""Train in one process, watch the memory that it occupies, on CPU or GPU, and draw that over time beside the loss.

    python launch/watch.py --out watched --model 6.7b --dtype bfloat16 --step-in-backward --steps 5 --log-every 1

All options are those of `launch/train.py`, which is run as it is, in a process of its own. On the CPU the allocator is
told to give tensors of more than 4 MB back to the system when they are freed, and to keep the rest, which are the
temporaries of a step. On a GPU, which nobody else is to use meanwhile, the driver says what is occupied, PyTorch's
reserve and its own 0.5 GB included; what tensors had at most, training tells at its end. Samples stand in
`memory.jsonl`, the picture in `memory.png`, both in `--out`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from launch.footprint.resident import resident
from launch.job import records
from launch.job.command_line import parse, saying_mistakes
from launch.job.folder import CONFIG, METRICS
from launch.job.stopping import child, run
from launch.job.world import UserError

SAMPLES, PICTURE = "memory.jsonl", "memory.png"
ABOUT = f"{__doc__.partition(chr(10))[0]} Needs --out, where {SAMPLES} and {PICTURE} will be."
INTERVAL = 0.2  # seconds
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(4 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20), "MALLOC_ARENA_MAX": "2"}

Sample = tuple[float, int]
"""Seconds since the start, bytes occupied."""


@saying_mistakes
def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status, that of the training."""
    options = parse(arguments, "watch.py", ABOUT)
    out = options.out
    if out is None:
        raise UserError("watching needs --out DIRECTORY")
    command = [sys.executable, str(Path(__file__).with_name("train.py")), *arguments]
    on_gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    before = occupied_on_gpu() if on_gpu else 0
    with child(command, env=os.environ | ALLOCATOR) as process:
        samples = watch(process, (lambda: occupied_on_gpu() - before) if on_gpu else lambda: resident(process.pid))
    if process.returncode == 0:
        counted = "occupied on the GPU" if on_gpu else "resident"
        print(f"most {counted}: {max(size for _, size in samples):,} bytes")
        with (out / SAMPLES).open("w") as file:
            file.writelines(json.dumps(sample) + "\n" for sample in samples)
        draw(out, samples, counted)
    return int(process.returncode)


def occupied_on_gpu() -> int:
    """Bytes of the GPU that are not free."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def watch(process: subprocess.Popen[bytes], occupied: Callable[[], int]) -> list[Sample]:
    """Sample what is occupied until a process ends."""
    start, samples = time.monotonic(), []
    while process.poll() is None:
        samples.append((round(time.monotonic() - start, 2), occupied()))
        time.sleep(INTERVAL)
    return [sample for sample in samples if sample[1]]


def draw(out: Path, samples: list[Sample], counted: str) -> None:
    """Draw memory over time, with what the weights take, and the loss of each step."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    config: dict[str, Any] = json.loads((out / CONFIG).read_text())
    weights = config["parameters"] * {"bfloat16": 2, "float32": 4}[config["dtype"]]
    logged = records.read(out / METRICS)
    losses = [(each["step"], each["train_bits_per_byte"]) for each in logged if "train_bits_per_byte" in each]
    figure, (memory, loss) = pyplot.subplots(1, 2, figsize=(11, 4.5), width_ratios=(2, 1), layout="constrained")
    memory.plot([seconds for seconds, _ in samples], [size / 1e9 for _, size in samples], linewidth=0.8)
    label = f"{config['dtype']} weights: {config['parameters'] / 1e9:.2f} B, {weights / 1e9:.2f} GB"
    memory.axhline(weights / 1e9, color="grey", linestyle="--", label=label)
    memory.set(xlabel="seconds", ylabel=f"memory, GB {counted}", ylim=(0, None))
    memory.legend(loc="lower right")
    loss.plot(*zip(*losses, strict=True), "o-")
    loss.set(xlabel="step", ylabel="training, bits per byte")
    loss.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(out / PICTURE, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run(main))
