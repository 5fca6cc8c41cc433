"""Draw every picture of README and pages that needs no training: ``python docs/images/draw.py``.

What was measured stands beside this file (`memory.jsonl`, `curves.jsonl`) and in the tables of `docs/quality.md`; what
can be reckoned is reckoned by the package. Pictures of training runs are made by the commands that the pages give.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import torch
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import flat_ranges
import shards

from launch.comparison.pictures import OTHERS, OURS, apart, running_mean
from launch.footprint.bars import draw_bars
from launch.job.model import GPT, PRESETS
from sm3_dist import plan
from sm3_dist.planner.other_optimizers import baseline
from sm3_dist.planner.sharding import Sharding
from sm3_dist.step.param_groups import ADAMW_LIKE

HERE = Path(__file__).parent
MODEL = "1.3b"
FLASHADAMW = (2.0, 2.0, 3.14)  # bfloat16 weights and gradients; state measured, databricks/flashoptim 0.1.4
PARTS = (("weights", "#9aa5b1"), ("gradients", "#c9d1d9"), ("optimizer state", OTHERS))


def main() -> None:
    """Write the pictures beside this file."""
    flat_ranges.main()
    shards.main()
    for name, draw in {"bytes": draw_bytes, "curves": draw_curves, "state": draw_state, "memory": draw_memory}.items():
        figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(HERE / f"{name}.png", dpi=110)
        pyplot.close(figure)


def draw_bytes(axes: Any) -> None:
    """Bytes per parameter that training holds: weights, gradients, optimizer state."""
    with torch.device("meta"):
        model = GPT(PRESETS[MODEL], 1024)
    count = sum(parameter.numel() for parameter in model.parameters())

    def state(name: str) -> float:
        return baseline(name, Sharding.of(model))[0].state / count

    def ours(dtype: torch.dtype, momentum: torch.dtype, in_backward: bool = False) -> tuple[float, ...]:
        known = inspect.signature(plan).parameters  # those that take memory
        options = {key: value for key, value in ADAMW_LIKE.items() if key in known} | {"momentum_dtype": momentum}
        made = plan(model.to(dtype), step_in_backward=in_backward, **options)[0]  # type: ignore[arg-type]
        return made.weights / count, made.gradients / count, made.state / count

    bars = {
        "AdamW": (4, 4, state("adamw")),
        "Muon, AdamW on embeddings": (4, 4, state("muon")),
        "8-bit AdamW": (4, 4, state("adamw-8bit")),
        "Adafactor, no momentum": (4, 4, state("adafactor")),
        "FlashAdamW": FLASHADAMW,
        "sm3_dist, float32 weights, bfloat16 momentum": ours(torch.float32, torch.bfloat16),
        "sm3_dist, bfloat16 weights, bfloat16 momentum": ours(torch.bfloat16, torch.bfloat16),
        "sm3_dist, bfloat16 weights, 8-bit momentum": ours(torch.bfloat16, torch.int8),
        "… and steps in backward": ours(torch.bfloat16, torch.int8, in_backward=True),
    }
    for row, (name, sizes) in enumerate(bars.items()):
        left = 0.0
        mine = name.startswith(("sm3", "…"))
        for size, (part, colour) in zip(sizes, PARTS, strict=True):
            colour = OURS if mine and part == "optimizer state" else colour
            axes.barh(row, size, left=left, color=colour, label=part if row == 0 else None)
            left += size
        axes.text(left + 0.15, row, f"{left:.1f}", va="center", weight="bold" if mine else None)
    axes.set_yticks(range(len(bars)), list(bars))
    for label in axes.get_yticklabels()[-4:]:
        label.set_weight("bold")
    axes.invert_yaxis()
    axes.set(xlabel="bytes per parameter", xlim=(0, 18))
    axes.set_title(f"What training holds: a decoder of {count / 1e9:.1f} B parameters")
    axes.legend(loc="lower right")


def draw_curves(axes: Any) -> None:
    """Training loss of four optimizers, each at its best learning rate."""
    records = [json.loads(line) for line in (HERE / "curves.jsonl").read_text().splitlines()]
    styles = {"AdamW": (OTHERS, 1.4), "Muon": ("#3b6ea5", 1.4)}
    styles |= {"sm3_dist, the recipe": (OURS, 2.6), "sm3_dist, orthogonal": ("#7a1fa2", 2.6)}
    for record in records:
        steps, losses = running_mean(record["step"], record["bits"], 10)
        colour, width = styles[record["name"]]
        axes.plot(
            steps,
            losses,
            color=colour,
            linewidth=width,
            label=f"{record['name']}, lr {record['lr']:g}: {record['validation']:.3f}",
        )
    axes.set(xlabel="step", ylabel="training loss, bits per byte\n(running mean over 100 steps)", ylim=(2, 4.2))
    axes.set_title("Byte-level GPT, 0.8 M parameters, one seed; in the legend the validation at the end")
    axes.legend()


def draw_state(axes: Any) -> None:
    """Final loss against bytes of state, from the table of quality.md."""
    section = (HERE.parent / "quality.md").read_text().split("### Others, at their best")[1].split("\n### ")[0]
    row = re.compile(r"^\| \**(.+?)\** \| ([\d.]+) \| [\d.]+ \| [\d.]* ?\| \**([\d.]+)\** \|", re.MULTILINE)
    found = [
        (name.replace("*", "").replace("`", ""), float(size), float(bits)) for name, size, bits in row.findall(section)
    ]
    heights = apart([(size, bits) for _, size, bits in found], 0.04, width=3)
    for (name, size, bits), height in zip(found, heights, strict=True):
        mine = name.startswith("SM3.adamw_like") or "MuonLikeSM3" in name
        axes.plot(size, bits, "o", color=OURS if mine else OTHERS, markersize=9 if mine else 6)
        colour, weight = (OURS, "bold") if mine else ("#333333", "normal")
        place: Any = {"xytext": (size + 0.25, height), "va": "center"}
        axes.annotate(name, (size, bits), **place, color=colour, weight=weight, fontsize=9)
    axes.set(xlabel="bytes of optimizer state per parameter", ylabel="validation, bits per byte", xlim=(-0.3, 10.5))
    axes.set_title("After 1,000 steps, each at its best learning rate; 0.8 M parameters, one seed")


def draw_memory(axes: Any) -> None:
    """Peak resident memory of training, from memory.jsonl."""
    draw_bars(axes, [json.loads(line) for line in (HERE / "memory.jsonl").read_text().splitlines()])


if __name__ == "__main__":
    main()
