"""One measurement: the most memory that a few training steps of a decoder take, sharded with FSDP2.

    torchrun --standalone --nproc-per-node 2 launch/footprint/footprint.py --model 1.3b --way sm3-bf16

`launch/memory.py` makes many and draws them. Every rank takes its base when everything is imported and a first small
model has been trained, and trains. How far the peak is above that, the kernel counts on the CPU (`VmHWM`), and on a GPU
PyTorch's allocator.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import Adafactor, AdamW, Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout works without being installed

from launch.footprint.meters import METERS
from launch.job.leaving import leave
from launch.job.model import GPT, PRESETS, Shape, cross_entropy
from launch.job.world import World, join
from sm3_dist import SM3, step_in_backward


class OnShards(Adafactor):
    """torch's Adafactor, which cannot step a DTensor, on this rank's rows of each matrix as if they were all of it.

    Updates are not those of Adafactor on whole matrices, but bytes are.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.sharded = list(params)
        super().__init__([nn.Parameter(param.to_local()) for param in self.sharded])  # type: ignore[attr-defined]

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for local, param in zip(self.param_groups[0]["params"], self.sharded, strict=True):
            local.grad = param.grad.to_local()  # type: ignore[union-attr]
        super().step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for param in self.sharded:
            param.grad = None


@dataclass(frozen=True)
class Way:
    """A way to train.

    Args:
        label: what the picture calls it.
        dtype: type of the weights that are kept.
        make: makes the optimizer of the sharded parameters.
        held: bytes per parameter that weights, gradients and state must take at least.
        mixed: compute in bfloat16 nevertheless.
        in_backward: step during backward, and keep no gradients.
        on: types of the devices that it is measured on unless it is asked for.
        needs: the package that it is from.
    """

    label: str
    dtype: torch.dtype
    make: Callable[[Iterable[Tensor]], Optimizer]
    held: float
    mixed: bool = False
    in_backward: bool = False
    on: tuple[str, ...] = ("cpu",)
    needs: str = "torch"


def flash_adamw(params: Iterable[Tensor]) -> Optimizer:
    """AdamW of databricks/flashoptim: weights with a residue of 8 bits, moments of 8 bits."""
    optimizer: Optimizer = importlib.import_module("flashoptim").FlashAdamW(list(params), lr=1e-3)
    return optimizer


def ways_on(device: str) -> list[str]:
    """The ways that are measured on a type of device, of packages that are installed."""
    return [name for name, way in WAYS.items() if device in way.on and importlib.util.find_spec(way.needs) is not None]


BOTH = ("cpu", "cuda")
sm3_bfloat16 = partial(SM3, lr=1e-3, stochastic_rounding=True)
recipe = partial(SM3.adamw_like, lr=1e-3)
recipe_bfloat16 = partial(recipe, stochastic_rounding=True)
WAYS = {
    "adamw": Way("AdamW, mixed precision", torch.float32, partial(AdamW, fused=True), 16, mixed=True, on=BOTH),
    "adamw-bf16": Way("AdamW, all in bfloat16", torch.bfloat16, partial(AdamW, fused=True), 8),
    "adafactor": Way("Adafactor, mixed precision", torch.float32, OnShards, 8, mixed=True),
    "sm3": Way("SM3, mixed precision", torch.float32, partial(SM3, lr=1e-3), 8, mixed=True),
    "sm3-bf16-momentum16": Way(
        "SM3, bfloat16, step in backward, bfloat16 momentum",
        torch.bfloat16,
        partial(sm3_bfloat16, momentum=0.9, momentum_dtype=torch.bfloat16),
        4,
        in_backward=True,
    ),
    "sm3-bf16-momentum8": Way(
        "SM3, bfloat16, step in backward, 8-bit momentum",
        torch.bfloat16,
        partial(sm3_bfloat16, momentum=0.9, momentum_dtype=torch.int8),
        3,
        in_backward=True,
    ),
    "sm3-bf16": Way("SM3, bfloat16, step in backward", torch.bfloat16, sm3_bfloat16, 2, in_backward=True),
    "flash-adamw": Way("FlashAdamW, bfloat16", torch.bfloat16, flash_adamw, 7.1, on=("cuda",), needs="flashoptim"),
    "recipe": Way("adamw_like, mixed precision", torch.float32, recipe, 12.1, mixed=True, on=("cuda",)),
    "recipe-bf16-momentum8": Way(
        "adamw_like, bfloat16, 8-bit momentum",
        torch.bfloat16,
        partial(recipe_bfloat16, momentum_dtype=torch.int8),
        5.1,
        on=("cuda",),
    ),
    "recipe-bf16-momentum16-backward": Way(
        "adamw_like, bfloat16, step in backward, bfloat16 momentum",
        torch.bfloat16,
        partial(recipe_bfloat16, momentum_dtype=torch.bfloat16),
        4.1,
        in_backward=True,
        on=("cuda",),
    ),
    "recipe-bf16-momentum8-backward": Way(
        "adamw_like, bfloat16, step in backward, 8-bit momentum",
        torch.bfloat16,
        partial(recipe_bfloat16, momentum_dtype=torch.int8),
        3.1,
        in_backward=True,
        on=("cuda",),
    ),
}


def main(arguments: list[str]) -> None:
    """Run the command line: rank 0 prints one line of JSON."""
    parser = argparse.ArgumentParser(prog="footprint.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", choices=list(PRESETS), required=True)
    parser.add_argument("--way", choices=list(WAYS), required=True)
    parser.add_argument("--device", choices=list(METERS), default="cpu")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=32, help="bytes in the one sequence that a rank reads")
    options = parser.parse_args(arguments)
    with join() as world:
        way, shape, meter = WAYS[options.way], PRESETS[options.model], METERS[options.device]()
        device = world.device(options.device)
        train(PRESETS["tiny"], way, world, options.steps, options.seq_len, device)
        meter.begin()
        train(shape, way, world, options.steps, options.seq_len, device)
        above = world.gather(meter.above())
        if world.leads:
            asked = {"way": options.way, "model": options.model, "device": options.device}
            print(json.dumps(asked | {"parameters": shape.count(options.seq_len), "bytes": above}))


def train(shape: Shape, way: Way, world: World, steps: int, seq_len: int, device: torch.device) -> None:
    """Build a model, and take a few steps on random bytes."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(shape, seq_len).to(way.dtype)
    shard(model, way, world, device)
    model.materialize(device)
    optimizer = way.make(model.parameters())
    if way.in_backward:
        step_in_backward(model, optimizer)  # type: ignore[arg-type]
    torch.manual_seed(world.rank)
    for _ in range(steps):
        tokens = torch.randint(256, (1, seq_len + 1)).to(device)
        cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def shard(model: GPT, way: Way, world: World, device: torch.device) -> None:
    """Apply FSDP2 to every matrix of a block, then to what is left: little is gathered at a time."""
    mesh = init_device_mesh(device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if way.mixed else None)
    wrap = partial(fully_shard, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for block in model.blocks:
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                wrap(layer)
        wrap(block)
    wrap(model)


if __name__ == "__main__":
    main(sys.argv[1:])
    leave(0)
