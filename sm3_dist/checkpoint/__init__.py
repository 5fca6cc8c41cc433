"""Checkpoints that move: saved under any wrapper and number of ranks, loaded under any other."""

from torch.distributed.checkpoint.state_dict import StateDictOptions

from sm3_dist.checkpoint.boxed import BoxedTensor
from sm3_dist.checkpoint.importing import from_adamw, from_torch_sm3
from sm3_dist.checkpoint.reading import CheckpointError, load
from sm3_dist.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from sm3_dist.checkpoint.train_state import TrainState

__all__ = [
    "BoxedTensor",
    "CheckpointError",
    "StateDictOptions",
    "TrainState",
    "from_adamw",
    "from_torch_sm3",
    "get_optimizer_state_dict",
    "get_state_dict",
    "load",
    "set_optimizer_state_dict",
    "set_state_dict",
]
