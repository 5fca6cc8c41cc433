"""What a framework must come to: a loop over the batches of all ranks, in one process, without any framework."""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from sm3_dist import SM3


def plain_loop(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], SM3],
    loss_of: Callable[[nn.Module, int, int], Tensor],
    ranks: int,
    steps: int,
    clip: float | None = None,
) -> dict[str, Tensor]:
    """Weights after ``steps`` steps, each with the mean of the gradients of ``loss_of(model, step, rank)``.

    Two ranks at most: the sum of more depends on its order.
    """
    optimizer = make_optimizer(model)
    for step in range(steps):
        for rank in range(ranks):
            (loss_of(model, step, rank) / ranks).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


def number_of_ranks() -> int:
    """Of the group that is there, or that a framework is to make of what torchrun says."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Whole, on the CPU, and on every rank."""
    return {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().cpu().clone()
        for name, param in model.named_parameters()
    }


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Under the names that the model has without a wrapper."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            named = {name: param.detach().cpu().clone() for name, param in model.named_parameters()}
    else:
        named = weights_of(model)
    return {name.replace("_fsdp_wrapped_module.", "").removeprefix("module."): named[name] for name in named}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names of tensors that are not the same to the bit, or of one side alone."""
    return [
        name for name in {**one, **other} if not (name in one and name in other and torch.equal(one[name], other[name]))
    ]
