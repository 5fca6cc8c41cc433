"""The step that PyTorch's checkpoint code takes to have the state made: it must not count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sm3_dist.layout.describe import local_tensor
from sm3_dist.step.param_groups import ParamGroup


def is_blank(groups: Sequence[ParamGroup], states: Mapping[Tensor, Any]) -> bool:
    """Whether this is that step: the first of all, at a learning rate of 0, all gradients there and 0."""
    if states or any(float(group["lr"]) != 0 for group in groups):
        return False
    grads = [param.grad for group in groups for param in group["params"] if param.requires_grad]
    return all(grad is not None and not grad.is_sparse and not local_tensor(grad).count_nonzero() for grad in grads)
