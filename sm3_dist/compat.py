"""What differs between the releases of PyTorch that are supported, 2.9 and up. No other file asks for the release."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
"""The names in ``torch.distributed``: the first of each from 2.13 on, the second up to 2.12."""


def all_gather_single(output: Any, input: Any, **options: Any) -> Any:
    """What is ``torch.distributed.all_gather_single`` from 2.13 on."""
    return getattr(dist, ALL_GATHER)(output, input, **options)


def reduce_scatter_single(output: Any, input: Any, **options: Any) -> Any:
    """What is ``torch.distributed.reduce_scatter_single`` from 2.13 on."""
    return getattr(dist, REDUCE_SCATTER)(output, input, **options)


Step = TypeVar("Step", bound=Callable[..., Any])


def whole_step(step: Step) -> Step:
    """Let ``torch.compile`` call an optimizer's ``step()`` and not look into it, hooks and profiling included.

    A step is a few launches already, from addresses that a graph would not see change. (What is public of this,
    ``torch.compiler.disable``, imports the compiler when it decorates; this does so when it is called, as the methods
    of PyTorch's own optimizers do. ``hooked`` says that the hooks are in already.)
    """
    hooked: Any = _disable_dynamo(Optimizer.profile_hook_step(step))
    hooked.hooked = True
    return cast(Step, hooked)


def give_gradient(tensor: Tensor, grad: Tensor) -> None:
    """Let ``tensor``, which is as wide as any gradient, have one of another type; up to 2.9 it must be of its own."""
    if hasattr(tensor, "grad_dtype"):
        if tensor.grad_dtype is not None:
            tensor.grad_dtype = None
        tensor.grad = grad
    else:
        tensor.grad = grad.to(tensor.dtype)
