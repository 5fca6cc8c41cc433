"""What must hold on any device and through its communication library: the bits that one process has on the CPU.

Each check runs on every rank of a default process group. ``tests/test_on_device.py`` runs them on the CPU through gloo,
``tests/gpu`` on GPUs through NCCL.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from flat_layouts import Model, clean, exact_gradient
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sm3_dist import SM3, step_in_backward
from sm3_dist.checkpoint import TrainState, load
from sm3_dist.step.param_groups import ADAMW_LIKE, MATRIX

STEPS = 4
RECIPE = ADAMW_LIKE | {"cover_block": 4, "weight_decay": 0.1}
OPTIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "paper": (torch.float32, {"momentum": 0.9}),
    "recipe": (torch.float32, RECIPE),
    "narrow": (torch.bfloat16, RECIPE | {"momentum_dtype": torch.int8, "stochastic_rounding": True}),
    "orthogonal": (torch.float32, ADAMW_LIKE | MATRIX),
}
ON_ONE_DEVICE = ("orthogonal",)
"""Those whose bits are those of one process on the same kind of device: libraries of products differ."""


def whole(model: Model, device: torch.device) -> nn.Module:
    return model.to(device)


def ddp(model: Model, device: torch.device) -> nn.Module:
    return DistributedDataParallel(model.to(device))


def fsdp2(model: Model, device: torch.device, **options: Any) -> nn.Module:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, **options)
    return model if options else model.to(device)


def fsdp2_offloaded(model: Model, device: torch.device) -> nn.Module:
    """Parameters, gradients and state on the CPU; what is computed on the device."""
    return fsdp2(model, device, offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda"))


def fsdp1(model: Model, device: torch.device, separate: bool) -> nn.Module:
    policy = ModuleWrapPolicy({type(model.blocks[0])})
    return FullyShardedDataParallel(model, device_id=device, use_orig_params=separate, auto_wrap_policy=policy)


WRAPPERS: dict[str, Callable[[Model, torch.device], nn.Module]] = {
    "whole": whole,
    "ddp": ddp,
    "zero1": ddp,
    "fsdp2": fsdp2,
    "fsdp2-offloaded": fsdp2_offloaded,
    "fsdp2-in-backward": fsdp2,
    "fsdp1": partial(fsdp1, separate=True),
    "fsdp1-flat": partial(fsdp1, separate=False),
}


class Sides:
    """A model trained on the device, in some wrapper, and the same whole on the CPU, in eager PyTorch.

    Args:
        wrapper: one of ``WRAPPERS``.
        options: one of ``OPTIONS``.
        device: this rank's.
        more: options of the wrapped side alone.
    """

    def __init__(self, wrapper: str, options: str, device: torch.device, **more: Any) -> None:
        self.dtype, given = OPTIONS[options]
        self.device = device
        self.compared_on = device if options in ON_ONE_DEVICE else torch.device("cpu")
        self.expected = Model(dtype=self.dtype).to(self.compared_on)
        self.model = WRAPPERS[wrapper](Model(dtype=self.dtype), device)
        self.alone = SM3(self.expected.parameters(), backend="eager", **given)
        if wrapper == "zero1":
            more["shard_over"] = dist.group.WORLD
        self.optimizer = SM3(self.model.named_parameters(), model=self.model, **given, **more)
        if wrapper == "fsdp2-in-backward":
            step_in_backward(self.model, self.optimizer)

    def gradients(self, step: int) -> dict[str, Tensor]:
        shapes = {name: weight.shape for name, weight in self.expected.named_parameters()}
        return {name: exact_gradient(step, name, shape).to(self.dtype) for name, shape in shapes.items()}

    def step(self, step: int) -> None:
        grads = self.gradients(step)
        self.expected({name: grad.to(self.compared_on) for name, grad in grads.items()}).backward()
        self.model({name: grad.to(self.device) for name, grad in grads.items()}).backward()
        for optimizer in (self.alone, self.optimizer):
            optimizer.step()
            optimizer.zero_grad()

    def compare(self) -> None:
        expected = dict(self.expected.named_parameters())
        if isinstance(self.model, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(self.model, writeback=False):  # it takes the memory back
                found = {clean(name): weight.detach().cpu().clone() for name, weight in self.model.named_parameters()}
        else:
            found = {clean(name): whole_of(weight).cpu() for name, weight in self.model.named_parameters()}
        assert found.keys() == expected.keys()
        differ = [name for name in expected if not torch.equal(found[name], expected[name].cpu())]
        assert differ == [], differ


def whole_of(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()


def compare(wrapper: str, options: str, device: torch.device) -> None:
    """Several steps."""
    sides = Sides(wrapper, options, device)
    for step in range(STEPS):
        sides.step(step)
    sides.compare()


def compare_scaled(device: torch.device) -> None:
    """GradScaler: gradients are unscaled in the step, and nobody takes one that overflows."""
    sides = Sides("fsdp2", "recipe", device, unscale_in_step=True)
    scaler = GradScaler(device.type, init_scale=2.0**10)
    for step in range(STEPS):
        grads = sides.gradients(step)
        if step != 1:
            sides.expected(grads).backward()
            sides.alone.step()
            sides.alone.zero_grad()
        loss = sides.model({name: grad.to(device) for name, grad in grads.items()})
        scaler.scale(loss * (torch.inf if step == 1 else 1)).backward()
        scaler.step(sides.optimizer)
        scaler.update()
        sides.optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**9
    sides.compare()


def compare_resumed(device: torch.device) -> None:
    """Half of the steps, a checkpoint, and the other half in a model that starts from it."""
    first, second = (Sides("fsdp2", "narrow", device) for _ in range(2))
    folders: list[Any] = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    for step in range(STEPS // 2):
        first.step(step)
    save({"train": TrainState(first.model, first.optimizer, step=STEPS // 2)}, checkpoint_id=folders[0])
    state = TrainState(second.model, second.optimizer)
    load({"train": state}, Path(folders[0]))
    assert state.step == STEPS // 2
    second.expected, second.alone = first.expected, first.alone
    for step in range(STEPS // 2, STEPS):
        second.step(step)
    second.compare()


CHECKS: dict[str, Callable[[torch.device], None]] = {
    f"{wrapper} {options}": partial(compare, wrapper, options)
    for wrapper in WRAPPERS
    for options in OPTIONS
    if options not in ON_ONE_DEVICE or wrapper not in ("fsdp2-offloaded", "fsdp2-in-backward")  # not on it; refused
}
CHECKS |= {"scaled": compare_scaled, "resumed": compare_resumed}
