"""What PyTorch's checkpoint code does with an optimizer: a step to have the state made, which must not count."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch import Tensor

from sm3_dist.layout.describe import Flattened, Replicas


def is_blank(states: Mapping[Tensor, Any]) -> bool:
    """Whether this is that step: the first of all, and called from there.

    Gradients of 0 and a learning rate of 0 do not tell it apart: a schedule may start at 0, with a shard whose rows
    nobody used. Who calls is the same on every rank.
    """
    return not states and _is_called_by("_init_optim_state")


def refuse_parts(replicas: Replicas | None, flattened: Flattened) -> None:
    """Raise where PyTorch asks for what is to be the state of all ranks, and each has a part that PyTorch cannot tell.

    Raises:
        NotImplementedError: says what to call instead.
    """
    by = "shard_over=" if replicas is not None and replicas.group.size() > 1 else ""
    by = by or ("fairscale's FullyShardedDataParallel" if flattened.by_fairscale else "")
    if by and _is_called_by("_get_optim_state_dict"):
        raise NotImplementedError(
            f"with {by} each rank has a part of the state, and torch.distributed.checkpoint would save one rank's for "
            "all. Use get_optimizer_state_dict and set_optimizer_state_dict of sm3_dist.checkpoint, with the same "
            "arguments, or its TrainState."
        )


def _is_called_by(name: str) -> bool:
    """Whether a function of torch.distributed.checkpoint.state_dict is being called."""
    function: Any = getattr(sys.modules.get("torch.distributed.checkpoint.state_dict"), name, None)
    code = getattr(inspect.unwrap(function), "__code__", None)
    frame: FrameType | None = sys._getframe(1)
    while code is not None and frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return code is not None and frame is not None
