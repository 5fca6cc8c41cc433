"""Silence: no parameter of an optimizer ever has a gradient, for the model has others by now."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

PATIENCE = 3
"""Steps without a gradient from the first on. Parameters that train have one sooner."""


def warn_of_silence(optimizer: Optimizer) -> None:
    """Have a warning given when the first steps of an optimizer update nothing on this rank.

    `fully_shard`, `model[0] = …` and frameworks put others in the place of parameters: an optimizer that was made
    before holds on to the old ones, and training would go on without an error and without effect.
    """
    left = PATIENCE

    def look(optimizer: Optimizer, *_: Any) -> None:
        nonlocal left
        if not left:
            return
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if any(map(_is_in_use, params)):
            left = 0
            return
        left -= 1
        if left or not any(param.requires_grad and param.numel() for param in params):
            return
        warnings.warn(
            f"step() was called {PATIENCE} times, and none of the {len(params)} parameters of this optimizer has had a "
            "gradient: nothing is updated. If the model has got others since, make the optimizer later: after "
            "fully_shard(model), or whatever wraps the model or exchanges its parameters.",
            stacklevel=2,
        )

    optimizer.register_step_post_hook(look)  # for good: PyTorch goes through its hooks while they run


def _is_in_use(param: Tensor) -> bool:
    """Whether it has a gradient, or those that want it as soon as it is there."""
    return param.grad is not None or bool(getattr(param, "_post_accumulate_grad_hooks", None))
