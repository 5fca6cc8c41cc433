"""Adapters describe how a wrapper lays out a parameter; they compute nothing.

Each adapter turns one parameter of the optimizer into a :class:`~sm3_dist.layout.shard.LocalShard` for every original
tensor in it. The first that matches is taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sm3_dist.layout import whole
from sm3_dist.layout.flat import Flattened
from sm3_dist.layout.kinds import is_dtensor
from sm3_dist.layout.shard import LocalShard
from sm3_dist.layout.zero import Replicas

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["Flattened", "Replicas", "as_state_tensor", "cut_like", "describe", "local_tensor"]

_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(
    param: Tensor,
    label: str,
    flattened: Flattened,
    replicas: Replicas | None = None,
    cover_block: int | None = None,
) -> tuple[LocalShard, ...]:
    """The local shards of the original tensors that ``param`` consists of.

    Args:
        param: a parameter of the optimizer, as the wrapper left it.
        label: what error messages call it.
        flattened: what is known of the model's flattened parameters.
        replicas: who updates what, where the parameters are replicas of one another.
        cover_block: indices per block of the covers, ``None`` for whole slices.

    Raises:
        TypeError: for parameters of other types, such as complex, integer and float8.
        ValueError: for layouts that cannot be trained, with what to do.
    """
    if param.dtype not in _TYPES:
        raise TypeError(
            f"SM3 takes parameters in float32, float64, bfloat16 and float16, but {label} of shape "
            f"{tuple(param.shape)} is {param.dtype}. "
            + ("Pass torch.view_as_real(parameter) instead." if param.dtype.is_complex else "Leave it out.")
        )
    if replicas is not None:
        if is_dtensor(param) or flattened.describe(param, label, cover_block):
            raise ValueError(
                f"{label} is sharded already (as a DTensor or by FSDP), but shard_over= takes parameters that lie "
                "whole on every rank. Leave shard_over out: the state is then sharded as the parameters are."
            )
        return replicas.describe(param, cover_block)
    if is_dtensor(param):
        from sm3_dist.layout import dtensor  # imports torch.distributed.tensor: see kinds.py

        return dtensor.describe(param, label, cover_block)
    return flattened.describe(param, label, cover_block) or whole.describe(param, cover_block)


def local_tensor(tensor: Tensor) -> Tensor:
    """The plain tensor that this rank holds of a parameter, a gradient or a state tensor."""
    if not is_dtensor(tensor):
        return tensor
    plain = tensor.to_local()
    return plain.wait() if hasattr(plain, "wait") else plain


def as_state_tensor(param: Tensor, part: Tensor, shard: LocalShard, i: int) -> Tensor:
    """The state tensor for accumulator ``i`` of ``shard``, of whose entries this rank stores ``part``."""
    if not is_dtensor(param):
        return part
    from sm3_dist.layout import dtensor

    return dtensor.accumulator(param, part, shard, i)


def cut_like(grad: DTensor, param: DTensor) -> DTensor:
    """A gradient, cut as its parameter is: a collective where it is cut otherwise or still a sum over ranks."""
    from sm3_dist.layout import dtensor

    return dtensor.cut_like(grad, param)
