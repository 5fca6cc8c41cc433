"""The hyperparameters in param groups: what of them is saved, and how they are taken over."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sm3_dist.optimizer import SM3
from sm3_dist.step.entry import HYPERPARAMETERS
from sm3_dist.step.param_groups import OF_PYTORCH

_OF_THE_CLASS = set(inspect.signature(SM3.__init__).parameters) - set(HYPERPARAMETERS)
"""Arguments of the optimizer as a whole, which wrappers of optimizers put into each of their param groups."""
_NOT_SAVED = {"params", "param_names", OF_PYTORCH, *_OF_THE_CLASS}


def saved_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """What of a param group is saved, besides the names of its tensors."""
    return {key: value for key, value in group.items() if key not in _NOT_SAVED}


def take_over(groups: Sequence[dict[str, Any]], changes: Sequence[Mapping[str, Any]]) -> None:
    """Write loaded hyperparameters into param groups.

    Tensors are written in place, for a CUDA graph may have their addresses; but not one that several groups share and
    that would have to have two values. What is loaded stays its owner's.

    Example:
        >>> lr = torch.tensor(0.1)
        >>> groups = [{"lr": lr}]
        >>> take_over(groups, [{"lr": torch.tensor(0.5)}])
        >>> lr
        tensor(0.5000)
    """
    wanted: dict[int, list[Any]] = defaultdict(list)
    for group, new in zip(groups, changes, strict=True):
        for key, held in group.items():
            if isinstance(held, Tensor):
                wanted[id(held)].append(new.get(key))
    alike = {number for number, values in wanted.items() if _are_alike(values)}
    for group, new in zip(groups, changes, strict=True):
        for key, value in new.items():
            if id(group.get(key)) in alike and group[key].shape == value.shape:
                group[key].copy_(value)
            else:
                group[key] = copy.deepcopy(value)


def _are_alike(values: Sequence[Any]) -> bool:
    """Whether all of them are tensors of one value."""
    return all(isinstance(value, Tensor) and torch.equal(value, values[0]) for value in values)
