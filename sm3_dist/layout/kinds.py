"""Kinds of tensors and modules that torch.distributed defines, told apart without importing what defines them.

Those imports cost as much as ``import torch`` itself. Where nobody else has made them, nothing is of these kinds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_dtensor(value: object) -> TypeIs[DTensor]:
    """Whether ``value`` is a DTensor."""
    return _is("torch.distributed.tensor", "DTensor", value)


def dtensors(values: Iterable[object]) -> list[DTensor]:
    """Those of the values that are DTensors."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return [] if kind is None else [value for value in values if isinstance(value, kind)]


def is_fsdp1(value: object) -> TypeIs[FullyShardedDataParallel]:
    """Whether ``value`` is a module in torch's FullyShardedDataParallel."""
    return _is("torch.distributed.fsdp", "FullyShardedDataParallel", value)


def reshard(model: nn.Module) -> None:
    """Put the shards back that wrappers have whole parameters in place of, as they do themselves after a backward pass.

    FSDP2 leaves those in a model after a forward pass that no backward pass has followed, and fairscale where a
    backward pass has no gradients of them, as of frozen ones.
    """
    for module in model.modules():
        if _is_fsdp2(module):
            module.reshard()
        elif _is("fairscale.nn.data_parallel", "FullyShardedDataParallel", module):
            _reshard_idle(module)


def _reshard_idle(module: Any) -> None:
    """Of fairscale: not while somebody has asked for whole parameters."""
    # (They have a shard of their own from the first forward pass on.)
    sharded = [p for p in module.params if p._is_sharded and hasattr(p, "_fp32_shard")]
    idle = [p for p in sharded if p.grad is None and p.shape != p._fp32_shard.shape]
    if idle and module.training_state.name == "IDLE":
        module._free_full_params(idle)
        module._use_fp32_param_shard(idle)


def _is_fsdp2(value: object) -> TypeIs[FSDPModule]:
    return _is("torch.distributed.fsdp", "FSDPModule", value)


def _is(module: str, name: str, value: object) -> bool:
    kind = getattr(sys.modules.get(module), name, None)  # absent while the module is being imported
    return kind is not None and isinstance(value, kind)
