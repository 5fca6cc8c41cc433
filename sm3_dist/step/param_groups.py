"""Param groups: what may be in them, and what a step, a plan and a message take from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sm3_dist.maths.momentum_code import LONGEST
from sm3_dist.maths.update import Settings

ParamGroup = dict[str, Any]

ADAMW_LIKE: dict[str, Any] = {
    "momentum": 0.9,
    "nesterov": True,
    "beta": 0.95,
    "bias_correction": True,
    "update_rms": 1.0,
    "cover_block": 64,
    "cover_product": True,
}
"""The options of :meth:`sm3_dist.SM3.adamw_like`."""

MATRIX = {"momentum": 0.95, "update_rms": None, "cover_block": None, "cover_product": False, "orthogonalize": True}
"""The options of the matrices of :class:`sm3_dist.MuonLikeSM3` that differ from those of the rest, ``ADAMW_LIKE``."""

BOUNDS = {"lr": math.inf, "momentum": 1.0, "beta": 1.0, "eps": math.inf, "weight_decay": math.inf}
"""The numbers in a param group, which are at least 0, and less than this."""

SQUARE_AVERAGES = "update_square_averages"
"""Key of the averages of squares of flattened parameters in the param groups of a state dict."""

FLAGS = ("maximize", "bias_correction", "nesterov", "cover_product", "stochastic_rounding")
"""What is on or off in a param group; that "false" is neither would go unnoticed."""

NEEDS = {"nesterov": "momentum", "bias_correction": "beta", "cover_product": "cover_block"}
"""Options that mean nothing without another."""

OF_PYTORCH = "differentiable"
"""What PyTorch adds to the defaults of every optimizer whose state is set as a whole, and only its own ones use."""

_REQUIRES_GRAD = attrgetter("requires_grad")


def adamw_like_options(options: dict[str, Any]) -> dict[str, Any]:
    """The recipe with some options changed; what means nothing without them goes too.

    Example:
        >>> adamw_like_options({"momentum": 0.0})["nesterov"]
        False
    """
    recipe = ADAMW_LIKE | options
    return recipe | _without_needs(recipe) | options


def _without_needs(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that mean nothing without what there is not, switched off."""
    return {option: False for option, needed in NEEDS.items() if not options[needed]}


def label_of(group: dict[str, Any], g: int, index: int) -> str:
    """What messages call a parameter: its name if it has one, else its position."""
    names = group.get("param_names") or ()
    if len(names) != len(group["params"]):  # fairscale's OSS gives a rank some of the parameters with all of the names
        return f"parameter {index} of param group {g}"
    return f"parameter {names[index]!r}"


def labelled_params(groups: Sequence[ParamGroup]) -> list[tuple[Tensor, str, ParamGroup]]:
    """All parameters in order, each with what messages call it and its group."""
    return [
        (param, label_of(group, g, index), group)
        for g, group in enumerate(groups)
        for index, param in enumerate(group["params"])
    ]


def layout_options(group: dict[str, Any]) -> tuple[Any, ...]:
    """What the state, and who works on it, depends on."""
    on = (group["momentum"] > 0, group["update_rms"] is not None)
    keys = ("cover_block", "bias_correction", "nesterov", "stochastic_rounding", "orthogonalize")
    return *on, *(group[key] for key in keys)


def can_move(param: Tensor) -> bool:
    """Whether a step may change it: whether it can have a gradient, or has one."""
    return param.requires_grad or param.grad is not None


def which_can_move(params: Sequence[Tensor]) -> list[bool]:
    """Of each parameter whether it can move; one answer, without a loop in Python, where all can."""
    required = list(map(_REQUIRES_GRAD, params))
    return [True] if all(required) else list(map(can_move, params))


def movable_params(groups: Sequence[ParamGroup]) -> list[tuple[Tensor, str]]:
    """The parameters that a step may change, each with what messages call it."""
    return [(param, label) for param, label, _ in labelled_params(groups) if can_move(param)]


def inverse_of(grad_scale: Tensor | None) -> float | Tensor | None:
    """What unscales gradients: as ``GradScaler.unscale_`` has it, rounded once to float32."""
    if grad_scale is None:
        return None
    inverse = grad_scale.double().reciprocal().float().reshape(())
    return inverse.item() if inverse.device.type == "cpu" else inverse


def settings_of(group: dict[str, Any], unscale: float | Tensor | None) -> Settings:
    """What a step needs to know of a group; ``unscale`` is what :func:`inverse_of` returned."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.item() if lr.device.type == "cpu" else lr.reshape(())
    names = ("momentum", "eps", "weight_decay", "maximize", "nesterov", "cover_product")
    old, new = averaging(group, 0)
    return Settings(lr, **{name: group[name] for name in names}, old=old, new=new, unscale=unscale)


def averaging(group: Mapping[str, Any], step: float) -> tuple[float, float]:
    """The weights of the covers and of the squared gradient in ``nu``, after ``step`` steps; 1 and 1 for sums.

    With bias correction that of the gradient is ``(1 - beta) / (1 - beta^t)`` in step ``t``, as in section 7.1 of the
    paper on Adafactor (arXiv 1804.04235): what is averaged is then an average of the gradients so far, and not of them
    and zeros before.

    Example:
        >>> group = {"beta": 0.5, "bias_correction": True}
        >>> averaging(group, 0), averaging(group | {"bias_correction": False}, 0), averaging({"beta": 0}, 0)
        ((0.0, 1.0), (0.5, 0.5), (1.0, 1.0))
    """
    beta = float(group["beta"])
    if not beta:
        return 1.0, 1.0
    if not group["bias_correction"]:
        return beta, 1 - beta
    new = (1 - beta) / (1 - beta ** (step + 1))
    return 1 - new, new


def corrected_averaging(beta: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`averaging` with bias correction, on the device where the counts of steps are; in float64."""
    new = (1 - beta) / (1 - beta ** (step.double() + 1))
    return torch.where(beta > 0, 1 - new, torch.ones_like(new)), new


def first_rms(group: Mapping[str, Any]) -> float:
    """The root mean square of the first update, if every element has a gradient: ``nu = (1 - beta) g^2``.

    Example:
        >>> first_rms({"beta": 0.95, "bias_correction": True})
        1.0
        >>> round(first_rms({"beta": 0.99, "bias_correction": False}), 6)
        10.0
    """
    return 1.0 if group["bias_correction"] else float(1 / math.sqrt(1 - group["beta"]))


AN_UPDATE_RMS = "greater than 0 and finite (or None)"


def is_update_rms(rms: object) -> bool:
    """Whether ``update_rms`` may be this: :data:`AN_UPDATE_RMS`."""
    return rms is None or (isinstance(rms, Real) and 0.0 < float(rms) < math.inf)


def validate(group: ParamGroup, number: int, momentum_dtype: torch.dtype | None = None) -> None:
    """Refuse hyperparameters out of range; names come as :func:`in_order` has them.

    Args:
        group: the param group.
        number: its place among those of the optimizer.
        momentum_dtype: type of the momentum.

    Raises:
        ValueError: says which, its value and what to do.
    """
    group["orthogonalize"] = in_order(group["orthogonalize"])
    try:
        _validate(group, momentum_dtype)
    except ValueError as error:
        raise ValueError(f"{error} (in param group {number})" if number else str(error)) from None


def in_order(orthogonalize: object) -> object:
    """Names as a tuple, in one order; whatever else it may be as it is. What they are given in may be gone after once.

    Example:
        >>> in_order(name for name in ("b", "a")), in_order(True)
        (('a', 'b'), True)
    """
    if isinstance(orthogonalize, str) or not isinstance(orthogonalize, Iterable):
        return orthogonalize
    return tuple(sorted(orthogonalize, key=str))


def validate_loaded(group: ParamGroup, number: int, momentum_dtype: torch.dtype | None) -> None:
    """As :func:`validate`, of a group that steps were taken with: its momentum, say, may have been set to 0 on the way.

    Raises:
        ValueError: as there.
    """
    validate({**group, **_without_needs(group)}, number, momentum_dtype)


def complete(groups: Sequence[ParamGroup], defaults: dict[str, Any]) -> None:
    """Add defaults to groups that were set as a whole: those of earlier releases have fewer options.

    PyTorch adds one of its own to the defaults then. It is taken out: with it a state dict does not fit an optimizer
    that has not loaded one, by what ``torch.distributed.checkpoint.state_dict`` asks of both.

    Example:
        >>> groups, defaults = [{"lr": 0.1}], {"lr": 1.0, "beta": 0.9, "differentiable": False}
        >>> complete(groups, defaults)
        >>> groups, defaults
        ([{'lr': 0.1, 'beta': 0.9}], {'lr': 1.0, 'beta': 0.9})
    """
    for options in (*groups, defaults):
        options.pop(OF_PYTORCH, None)
    for group in groups:
        group.update({**defaults, **group})


def loaded_options(
    state_dict: Mapping[str, Any], optimizer: Optimizer, momentum_dtype: torch.dtype | None
) -> list[ParamGroup]:
    """The param groups of a loaded state dict. There may be more than the optimizer has, or fewer: the caller says so.

    Raises:
        ValueError: if they cannot be the hyperparameters of its groups. (Where groups were cut otherwise, PyTorch's
            ``set_optimizer_state_dict`` leaves some without any.)
    """
    result = []
    for g, old in enumerate(state_dict["param_groups"]):
        group = optimizer.param_groups[g] if g < len(optimizer.param_groups) else {"params": []}
        was, now = old.get("param_names", ()), group.get("param_names", ())
        if "beta" not in old:
            has = ", ".join(str(key) for key in old if key not in ("params", "param_names")) or "no hyperparameters"
            raise ValueError(
                f"param group {g} of the loaded state has {has}, and no beta: it was saved by another optimizer, or by "
                "an SM3 with other param groups. Make the optimizer with the recipe and the param groups of then, or "
                "load with sm3_dist.checkpoint.set_optimizer_state_dict, which takes parameters out of any groups by "
                "their names."
            )
        by_position = all(isinstance(key, int) for key in old["params"])
        if by_position and list(was) != list(now) and sorted(was) == sorted(now):
            at = next(k for k, (one, other) in enumerate(zip(was, now, strict=True)) if one != other)
            raise ValueError(
                f"number {at} of the parameters in param group {g} is {now[at]!r}, but was {was[at]!r} when the state "
                "was saved, and it is loaded by position. Pass the parameters in the order of then, or save and load "
                "with sm3_dist.checkpoint, which goes by name."
            )
        left_out = (SQUARE_AVERAGES, "param_names") if now else (SQUARE_AVERAGES,)
        result.append({key: value for key, value in old.items() if key not in left_out})
        validate_loaded({**optimizer.defaults, **old, "params": group["params"]}, g, momentum_dtype)
    return result


OF_ADAM = {
    "betas": "pass momentum=betas[0] and beta=betas[1]",
    "fused": "leave it out: every step is one pass already, and backend= says by which kernel",
    "foreach": "leave it out: every step is one pass already, and backend= says by which kernel",
    "capturable": "leave it out: on a GPU steps are counted there",
    "amsgrad": "leave it out: SM3 has nothing like it",
    "differentiable": "leave it out: SM3 has nothing like it",
}
"""What PyTorch's Adam takes and SM3 does not, and what to do."""


def refuse_options_of_adam(names: Iterable[str]) -> None:
    """Raise for arguments that there are not.

    Raises:
        TypeError: says what to pass instead.

    Example:
        >>> refuse_options_of_adam(["betas"])
        Traceback (most recent call last):
        TypeError: SM3 has no argument betas: pass momentum=betas[0] and beta=betas[1]
    """
    for name in names:
        raise TypeError(f"SM3 has no argument {name}" + (f": {OF_ADAM[name]}" if name in OF_ADAM else ""))


def _validate(group: ParamGroup, momentum_dtype: torch.dtype | None) -> None:
    refuse_options_of_adam(set(group) & {"betas"})
    if momentum_dtype not in (None, torch.float32, torch.bfloat16, torch.int8):
        raise ValueError(
            f"momentum_dtype must be torch.float32, torch.bfloat16, torch.int8 or None, but is {momentum_dtype!r}"
        )
    _check_numbers(group)
    for name in FLAGS:
        if group[name] not in (True, False):
            raise TypeError(f"{name} must be True or False, but is the {type(group[name]).__name__} {group[name]!r}")
    _check_needs(group)
    wanted = group["orthogonalize"]
    if not isinstance(wanted, bool) and not (isinstance(wanted, tuple) and all(isinstance(n, str) for n in wanted)):
        raise ValueError(f"orthogonalize must be True, False or names of tensors, but is {wanted!r}")
    rms, block = group["update_rms"], group["cover_block"]
    if not is_update_rms(rms):
        raise ValueError(f"update_rms must be {AN_UPDATE_RMS}, but is {rms!r}")
    if rms is not None and float(rms) > 1 and group["momentum"] and momentum_dtype == torch.int8:
        raise ValueError(
            f"momentum_dtype=torch.int8 keeps momentum of up to {LONGEST}, which updates with update_rms={rms} would "
            "exceed: it may be 1 at most. Pass update_rms=1.0 and multiply lr instead: steps are as long"
        )
    seed = group["rounding_seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ValueError(f"rounding_seed must be an integer in [0, 2^64), but is {seed!r}")
    if group["stochastic_rounding"] and any(param.dtype == torch.float16 for param in group["params"]):
        raise ValueError(
            "stochastic_rounding=True rounds to bfloat16, but parameters of this group are float16. Use bfloat16 "
            "weights, or leave it out"
        )
    if block is not None and (isinstance(block, bool) or not isinstance(block, int) or block < 1):
        raise ValueError(f"cover_block must be an integer of at least 1 (or None), but is {block!r}")


def _check_numbers(group: ParamGroup) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a float or a tensor of one element, not a tensor of shape {tuple(lr.shape)}")
    for name, bound in BOUNDS.items():
        if not isinstance(group[name], (Real, Tensor)):
            raise TypeError(
                f"{name} must be a number, but is the {type(group[name]).__name__} {group[name]!r}. (YAML reads 1e-3 "
                "as a string: write 1.0e-3.)"
            )
        if not 0.0 <= float(group[name]) < bound:
            raise ValueError(f"{name} must be at least 0 and less than {bound}, but is {float(group[name])}")


def _check_needs(group: ParamGroup) -> None:
    """Options that mean nothing without another: :data:`NEEDS`, and what to do."""
    if group["bias_correction"] and not group["beta"]:
        raise ValueError(
            "bias_correction=True corrects the moving average of beta > 0, but beta is 0. Pass it as False"
        )
    if group["nesterov"] and not group["momentum"]:
        raise ValueError(
            "nesterov=True looks ahead along the momentum, but momentum is 0. Set it, to 0.9 say, or pass it as False"
        )
    if group["cover_product"] and group["cover_block"] is None:
        raise ValueError("cover_product=True is for block covers. Set cover_block, to 64 say, or pass it as False")
