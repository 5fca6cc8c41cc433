"""What a scheduler may have written into param groups since the last step, looked at before they are used."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from numbers import Real

from torch import Tensor

from sm3_dist.step.param_groups import AN_UPDATE_RMS, BOUNDS, ParamGroup, is_update_rms


def check_scheduled(groups: Sequence[ParamGroup]) -> None:
    """Refuse a learning rate, or another option, that no step can be taken with.

    One on a GPU is not looked at: the host would wait for it.

    Raises:
        ValueError: says which, of which group, and who writes it.

    Example:
        >>> good = {"lr": 0.1, "momentum": 0.9, "beta": 0.95, "eps": 1e-30, "weight_decay": 0.1}
        >>> good |= {"update_rms": 1.0, "orthogonalize": False}
        >>> check_scheduled([good, good | {"lr": -1e-3}])
        Traceback (most recent call last):
        ValueError: lr of param group 1 must be at least 0 and finite, but is -0.001...
    """
    for g, group in enumerate(groups):
        for name, bound in BOUNDS.items():
            value = group[name]
            if isinstance(value, Tensor) and value.device.type != "cpu":
                continue
            number = float(value) if isinstance(value, (Real, Tensor)) else math.nan
            if not 0.0 <= number < bound:
                limit = "finite" if bound == math.inf else f"less than {bound:g}"
                _refuse(g, name, number if isinstance(value, Tensor) else value, f"at least 0 and {limit}")
        rms, wanted = group["update_rms"], group["orthogonalize"]
        if not is_update_rms(rms):
            _refuse(g, "update_rms", rms, AN_UPDATE_RMS)
        if isinstance(wanted, str) or wanted is None:
            _refuse(g, "orthogonalize", wanted, "True, False or names of tensors")


def _refuse(g: int, name: str, value: object, wanted: str) -> None:
    raise ValueError(
        f"{name} of param group {g} must be {wanted}, but is {value!r}. It was set after the optimizer was made, most "
        "often by a scheduler: look at its arguments, and at how often its step() is called. Nothing was updated."
    )


def warn_of_cycled_momentum(groups: Sequence[ParamGroup], without: set[int]) -> None:
    """Warn where ``OneCycleLR`` or ``CyclicLR`` switched on the momentum of a group that was made without it.

    Args:
        groups: the param groups.
        without: positions of groups that were made with ``momentum=0``; those that have momentum now are taken out.
    """
    for g, group in enumerate(groups):
        if g not in without or not group["momentum"] > 0:
            continue
        without.remove(g)
        if "max_momentum" in group:  # both schedulers leave it there
            warnings.warn(
                f"OneCycleLR or CyclicLR set the momentum of param group {g} to {group['momentum']:g}, but SM3 was "
                "made with momentum=0: from now on it keeps one more value per element. Pass cycle_momentum=False to "
                "the scheduler, or, if momentum is wanted, momentum=0.9 to SM3.",
                stacklevel=2,
            )
