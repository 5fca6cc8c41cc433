"""Kinds of tensors and modules that torch.distributed defines, told apart without importing what defines them.

Those imports cost as much as ``import torch`` itself. Where nobody else has made them, nothing is of these kinds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

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
    """Put the shards back that FSDP2 has whole parameters in place of, as PyTorch's state dicts do.

    It leaves those in a model after a forward pass that no backward pass has followed.
    """
    for module in model.modules():
        if _is_fsdp2(module):
            module.reshard()


def _is_fsdp2(value: object) -> TypeIs[FSDPModule]:
    return _is("torch.distributed.fsdp", "FSDPModule", value)


def _is(module: str, name: str, value: object) -> bool:
    kind = getattr(sys.modules.get(module), name, None)  # absent while the module is being imported
    return kind is not None and isinstance(value, kind)
