"""State of other optimizers as state of SM3, by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sm3_dist.layout.box import Box
from sm3_dist.layout.cover import accumulator_count, cell, maxima
from sm3_dist.step.state import as_tensor

StateDict = dict[str, Any]


def from_torch_sm3(state_dict: Mapping[str, Any], names: Iterable[str] | None = None) -> StateDict:
    """What the package torch-SM3 saved, for :func:`set_optimizer_state_dict` under any wrapper.

    In one process ``SM3.load_state_dict`` takes such a state dict as it is.

    Args:
        state_dict: ``optimizer.state_dict()`` of torch-SM3, with whole tensors.
        names: the parameters' names, in the order in which that optimizer got them: those of
            ``model.named_parameters()`` before wrapping. ``None``: the state dict is by name already.

    Returns:
        Whole tensors by name; pass ``options=StateDictOptions(full_state_dict=True)`` with them.

    Raises:
        ValueError: if it is not the state of torch-SM3, or there are not as many names as parameters.

    Example:
        >>> import torch
        >>> from sm3_dist import SM3
        >>> from sm3_dist.checkpoint import StateDictOptions, from_torch_sm3, set_optimizer_state_dict
        >>> model = torch.nn.Linear(2, 3, bias=False)
        >>> old = {"step": 5, "accumulator_0": torch.ones(3, 1), "accumulator_1": torch.ones(1, 2)}
        >>> group = {"params": [0], "lr": 0.1, "momentum": 0.0, "beta": 0.0, "eps": 1e-30}
        >>> converted = from_torch_sm3({"state": {0: old}, "param_groups": [group]}, ["weight"])
        >>> optimizer = SM3(model.parameters())
        >>> set_optimizer_state_dict(model, optimizer, converted, options=StateDictOptions(full_state_dict=True))
        >>> optimizer.state[model.weight]["accumulator_0"]
        tensor([1., 1., 1.])
    """

    def convert(old: Mapping[str, Any]) -> dict[str, Tensor]:
        if "accumulator_0" not in old:
            raise ValueError(f"this is not the state of torch-SM3: it has {sorted(old)}, but no accumulator_0")
        first = old["accumulator_0"]
        scalar = first.dim() == 0
        state = {"step": as_tensor(old.get("step", 0)).float()}
        for i in range(max(1, first.dim())):
            # For sparse gradients there are rows alone: their maximum bounds the entries of the other dimensions.
            cover = old.get(f"accumulator_{i}")
            if cover is None:
                raise ValueError(
                    "this state has accumulators of the rows alone (sparse gradients). Load it into an unsharded SM3 "
                    "with optimizer.load_state_dict, and move it from there"
                )
            state[f"accumulator_{i}"] = cover.float().reshape(() if scalar else (-1,))
        buffer = old.get("momentum_buffer")
        if isinstance(buffer, Tensor):
            state["momentum_buffer"] = buffer
        return state

    return _convert(state_dict, names, convert, keep_options=True)


def from_adamw(
    state_dict: Mapping[str, Any],
    names: Iterable[str] | None = None,
    *,
    sums: bool = False,
    cover_block: int | None = None,
) -> StateDict:
    """A start for SM3 from what Adam or AdamW saved: accumulators are the maxima of ``exp_avg_sq``.

    Both are averages of squared gradients, Adam's for each element, SM3's (with ``beta > 0``) for each row and column.
    Steps are as long as if the largest element spoke for its row. Momentum starts at zero: Adam averages gradients, and
    SM3 updates. Hyperparameters stay those of the SM3 optimizer.

    Args:
        state_dict: ``optimizer.state_dict()`` of Adam or AdamW with ``names``, or by name as
            :func:`torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` returns it (DTensors too).
        names: the parameters' names, in the order in which that optimizer got them; ``None``: it is by name already.
        sums: for SM3 with ``beta=0``, which sums squared gradients: multiply the averages by the number of steps.
        cover_block: as SM3 has it.

    Returns:
        Whole tensors by name; pass ``options=StateDictOptions(full_state_dict=True)`` with them.

    Raises:
        ValueError: if it is not the state of Adam, or there are not as many names as parameters.

    Example:
        >>> import torch
        >>> from sm3_dist import SM3
        >>> from sm3_dist.checkpoint import StateDictOptions, from_adamw, set_optimizer_state_dict
        >>> model = torch.nn.Linear(2, 3, bias=False)
        >>> adamw = torch.optim.AdamW(model.parameters())
        >>> model(torch.tensor([[1.0, 2.0]])).sum().backward()
        >>> adamw.step()
        >>> optimizer = SM3(model.parameters(), lr=1e-3, momentum=0.9, beta=0.95)
        >>> converted = from_adamw(adamw.state_dict(), ["weight"])
        >>> set_optimizer_state_dict(model, optimizer, converted, options=StateDictOptions(full_state_dict=True))
        >>> optimizer.state[model.weight]["accumulator_1"]
        tensor([0.0010, 0.0040])
    """

    def convert(old: Mapping[str, Any]) -> dict[str, Tensor]:
        if "exp_avg_sq" not in old:
            raise ValueError(f"this is not the state of Adam: it has {sorted(old)}, but no exp_avg_sq")
        squares, step = old["exp_avg_sq"], as_tensor(old["step"]).float()
        if isinstance(squares, DTensor):
            squares = squares.full_tensor()
        squares = squares.double() if squares.dtype == torch.float64 else squares.float()
        if sums:
            squares = squares * step.to(squares.device)
        state = {"step": step, "update_square_average": torch.zeros((), dtype=torch.int64, device="cpu")}
        tensor = squares.reshape(squares.shape or (1,))
        for i in range(accumulator_count(tensor.shape, cover_block)):
            cover = maxima(tensor, Box.whole(tensor.shape), cell(tuple(tensor.shape), i, cover_block))
            state[f"accumulator_{i}"] = (
                cover if cover_block and squares.dim() else cover.reshape(squares.shape[i : i + 1])
            )
        state["momentum_buffer"] = squares.new_zeros(()).expand(squares.shape)
        return state

    return _convert(state_dict, names, convert, keep_options=False)


def _convert(
    state_dict: Mapping[str, Any],
    names: Iterable[str] | None,
    convert: Callable[[Mapping[str, Any]], dict[str, Tensor]],
    keep_options: bool,
) -> StateDict:
    groups = state_dict["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    names = None if names is None else list(names)
    if names is None and not all(isinstance(key, str) for key in keys):
        raise ValueError("this state dict is by number; pass names=[name for name, _ in model.named_parameters()]")
    if names is not None and len(names) != len(keys):
        raise ValueError(
            f"{len(names)} names for {len(keys)} parameters. Pass the names of exactly the parameters that the "
            "optimizer had, in its order"
        )
    name_of = dict(zip(keys, keys if names is None else names, strict=True))
    known = ("lr", "momentum", "beta", "eps", "initial_lr") if keep_options else ()
    return {
        "state": {name_of[key]: convert(old) for key, old in state_dict["state"].items()},
        "param_groups": [
            {"params": [name_of[key] for key in group["params"]]} | {k: v for k, v in group.items() if k in known}
            for group in groups
        ],
    }
