"""The recipe: which optimizer, with which settings, at which learning rate when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adafactor, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from launch.world import UserError
from sm3_dist import SM3
from sm3_dist.schedule import CosineSchedule, PaperSchedule

if TYPE_CHECKING:
    from launch.options import Options

SCHEDULES: dict[str, Callable[[int], Callable[[int], float]]] = {"paper": PaperSchedule, "cosine": CosineSchedule}


@dataclass(frozen=True)
class Settings:
    """What an optimizer is told."""

    lr: float
    momentum: float = 0.0
    beta: float = 0.0
    weight_decay: float = 0.0


def sm3(model: nn.Module, s: Settings, shard_over: ProcessGroup | None = None) -> Optimizer:
    return SM3(model.named_parameters(), s.lr, s.momentum, s.beta, weight_decay=s.weight_decay, shard_over=shard_over)


def adamw(model: nn.Module, s: Settings) -> Optimizer:
    return AdamW(model.named_parameters(), s.lr, (s.momentum, s.beta), weight_decay=s.weight_decay, fused=True)


def adafactor(model: nn.Module, s: Settings) -> Optimizer:
    if is_sharded(model):
        raise UserError("torch.optim.Adafactor cannot update sharded tensors (DTensor); pass --parallel ddp")
    return Adafactor(model.named_parameters(), s.lr, weight_decay=s.weight_decay)


def sgd(model: nn.Module, s: Settings) -> Optimizer:
    fused = not is_sharded(model)  # torch has no fused SGD for DTensor
    return SGD(model.named_parameters(), s.lr, s.momentum, weight_decay=s.weight_decay, fused=fused)


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@dataclass(frozen=True)
class Recipe:
    """An optimizer and how to use it.

    Args:
        make: makes it, of the wrapped model and the settings.
        best: the settings that were found best on the default job.
        unknown: settings that this optimizer does not have.
    """

    make: Callable[[nn.Module, Settings], Optimizer]
    best: Settings
    unknown: tuple[str, ...] = ()


# One entry for each choice of --optimizer.
OPTIMIZERS = {
    "sm3": Recipe(sm3, Settings(lr=1e-3, momentum=0.9, beta=0.95)),
    "adamw": Recipe(adamw, Settings(lr=2e-3, momentum=0.9, beta=0.95)),
    "adafactor": Recipe(adafactor, Settings(lr=3e-2), unknown=("momentum", "beta")),
    "sgd": Recipe(sgd, Settings(lr=0.3, momentum=0.9), unknown=("beta",)),
}


def settings(options: Options) -> Settings:
    """Return the settings of the chosen optimizer: the best known, and over them what the command line says.

    Raises:
        UserError: the optimizer has no such setting, or the value is out of range.
    """
    recipe = OPTIMIZERS[options.optimizer]
    said = {name: getattr(options, name) for name in ("lr", "momentum", "beta", "weight_decay")}
    said = {name: value for name, value in said.items() if value is not None}
    for name, value in said.items():
        limit = 1.0 if name in ("momentum", "beta") else float("inf")
        if name in recipe.unknown:
            raise UserError(f"--optimizer {options.optimizer} has no {name}; leave --{name} out")
        if not 0 <= value < limit:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 0 and less than {limit}")
    return replace(recipe.best, **said)


def build(model: nn.Module, settings: Settings, options: Options, shard_over: ProcessGroup | None = None) -> Optimizer:
    """Make the chosen optimizer for ``model``, the wrapped one.

    Raises:
        UserError: its state is to be sharded over ranks, and it cannot do that.
    """
    if shard_over is None:
        return OPTIMIZERS[options.optimizer].make(model, settings)
    if options.optimizer != "sm3":
        raise UserError(
            f"--parallel zero1 is for --optimizer sm3; {options.optimizer} holds the state of every parameter on every "
            "rank, pass --parallel ddp"
        )
    return sm3(model, settings, shard_over)


def schedule(optimizer: Optimizer, options: Options) -> LambdaLR:
    """Make the scheduler, to be stepped after every optimizer step."""
    return LambdaLR(optimizer, SCHEDULES[options.schedule](options.steps))


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the optimizer's state that this rank holds."""
    return count_bytes(dict(optimizer.state))


def adamw_bytes(optimizer: Optimizer) -> int:
    """Bytes that AdamW would hold for the same parameters here: two moments each."""
    return 2 * sum(count_bytes(group["params"]) for group in optimizer.param_groups)


def count_bytes(value: Any) -> int:
    """Bytes of all tensors in ``value``, of a DTensor those on this rank."""
    if isinstance(value, torch.Tensor):
        local = value.to_local() if isinstance(value, DTensor) else value
        return local.numel() * local.element_size()
    if isinstance(value, dict):
        return sum(count_bytes(each) for each in value.values())
    if isinstance(value, (list, tuple)):
        return sum(count_bytes(each) for each in value)
    return 0
