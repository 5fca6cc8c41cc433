"""The state of one parameter: how it is made, and how a loaded one is taken over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sm3_dist.layout.describe import as_state_tensor, local_tensor
from sm3_dist.layout.kinds import is_dtensor
from sm3_dist.layout.shard import WHOLE, LocalShard, accumulator_dtype
from sm3_dist.maths.momentum_code import (
    MOMENTUM_BUFFER,
    MOMENTUM_CODE,
    OLD_CODE,
    converted,
    momentum_key,
    refusal_of_old_codes,
)
from sm3_dist.maths.rms import SquareSum, square_sum
from sm3_dist.step.cover_minimum import read_minimum, write_minimum
from sm3_dist.step.param_groups import SQUARE_AVERAGES

State = dict[str, Any]


def accumulator_key(shard: LocalShard, i: int) -> str:
    """Name of accumulator ``i`` in the state of its parameter."""
    return f"{shard.name}.accumulator_{i}" if shard.name else f"accumulator_{i}"


def square_average_key(shard: LocalShard) -> str:
    """Name of the moving average of sums of squares (:mod:`~sm3_dist.maths.rms`) in the state of its parameter."""
    return f"{shard.name}.update_square_average" if shard.name else "update_square_average"


def fill_state(
    state: State,
    param: Tensor,
    shards: Sequence[LocalShard],
    group: Mapping[str, Any],
    momentum_dtype: torch.dtype | None,
) -> None:
    """Add what is missing: ``step`` and zero accumulators, and what the options of the param group need besides.

    That is a momentum buffer for ``momentum``, and for ``update_rms`` an average of the sums of squares of updates.
    """
    dtype = accumulator_dtype(param.dtype)
    device = local_tensor(param).device
    state.setdefault("step", torch.zeros((), dtype=torch.float32, device=step_device(param)))
    for shard in shards:
        for i in range(shard.accumulator_count):
            key = accumulator_key(shard, i)
            if key not in state:
                part = torch.zeros(_local_shape(param, shard, i), dtype=dtype, device=device)
                state[key] = as_state_tensor(param, part, shard, i)
        if group["update_rms"] is not None:
            state.setdefault(square_average_key(shard), torch.zeros((), dtype=torch.int64, device=device))
    if group["momentum"] > 0 and momentum_key(momentum_dtype or dtype) not in state:
        state[momentum_key(momentum_dtype or dtype)] = _zeros(param, shards, momentum_dtype or dtype)


def held_accumulators(state: State, shard: LocalShard) -> list[Tensor]:
    """What the state holds of the accumulators of one shard, as rectangles ``shard.held`` of their grids; views."""
    parts = [local_tensor(state[accumulator_key(shard, i)]) for i in range(shard.accumulator_count)]
    return [part.view(held.shape) for part, held in zip(parts, shard.held, strict=True)]


def accumulator_keys(shard: LocalShard) -> list[str]:
    """The names of all accumulators in the state of the parameter."""
    return [accumulator_key(shard, i) for i in range(shard.accumulator_count)]


def local_momentum(state: State, group: Mapping[str, Any]) -> Tensor | None:
    """The momentum, or its codes; ``None`` without momentum."""
    if not group["momentum"] > 0:
        return None
    return local_tensor(state[MOMENTUM_CODE if MOMENTUM_CODE in state else MOMENTUM_BUFFER])


def local_square_sum(state: State, shard: LocalShard, group: Mapping[str, Any]) -> SquareSum | None:
    """What ``update_rms`` goes by; ``None`` without."""
    if group["update_rms"] is None:
        return None
    return square_sum(shard.shape, state[square_average_key(shard)])


def adopt_state(
    loaded: Mapping[str, Any],
    param: Tensor,
    shards: Sequence[LocalShard],
    label: str,
    momentum_dtype: torch.dtype | None,
) -> State:
    """A copy of a loaded state, in the types and shapes of this optimizer, on the parameter's device.

    Also takes what torch-SM3 saved: accumulators of shape ``(1, n, 1)`` in the parameter's type, ``step`` an int,
    ``momentum_buffer`` the float 0.0 where there was none, and only ``accumulator_0`` for sparse gradients. And what
    :func:`parameter_shaped` made; accumulators of cut tensors are then yet to be shared.

    Raises:
        ValueError: if a tensor does not have the shape that this rank stores.
    """
    if "exp_avg_sq" in loaded:
        raise ValueError(
            f"the loaded state of {label} is that of Adam ({', '.join(loaded)}). Convert it with "
            "sm3_dist.checkpoint.from_adamw(state_dict, names), and load what that returns with "
            "sm3_dist.checkpoint.set_optimizer_state_dict."
        )
    if OLD_CODE in loaded:
        raise ValueError(refusal_of_old_codes(label))
    dtype = accumulator_dtype(param.dtype)
    step = as_tensor(loaded.get("step", 0)).detach()
    state: State = {"step": step.to(step_device(param), torch.float32, copy=True)}
    minimum = loaded.get("cover_minimum")
    if minimum is not None:
        plain = local_tensor(_zeros(param, shards, dtype))
        minimum = _adopt(minimum, tuple(plain.shape), dtype, param, f"cover_minimum of {label}")
    for shard in shards:
        for i, part in _adopted_accumulators(loaded, param, shard, minimum, label):
            state[accumulator_key(shard, i)] = as_state_tensor(param, part, shard, i)
        average = loaded.get(square_average_key(shard))
        if average is not None:
            average = as_tensor(average).detach()
            state[square_average_key(shard)] = average.to(local_tensor(param).device, torch.int64, copy=True)
    for key in (MOMENTUM_BUFFER, MOMENTUM_CODE):
        buffer = loaded.get(key)
        if isinstance(buffer, Tensor):
            target = _zeros(param, shards, momentum_dtype or dtype)
            plain = local_tensor(target)
            found = _adopt(buffer, tuple(plain.shape), buffer.dtype, param, f"{key} of {label}")
            plain.copy_(converted(found, plain.dtype))
            state[momentum_key(plain.dtype)] = target
    return state


def _adopted_accumulators(
    loaded: Mapping[str, Any], param: Tensor, shard: LocalShard, minimum: Tensor | None, label: str
) -> Iterator[tuple[int, Tensor]]:
    """Copies of the accumulators of a loaded state, or those that follow from their minimum, each with its number."""
    shapes = [_local_shape(param, shard, i) for i in range(shard.accumulator_count)]
    if minimum is not None:
        for i, part in enumerate(read_minimum(shard, minimum)):
            yield i, part.reshape(shapes[i])
        return
    first, rows_alone = accumulator_key(shard, 0), is_of_rows_alone(loaded, shard)
    for i, (key, shape) in enumerate(zip(accumulator_keys(shard), shapes, strict=True)):
        value = loaded.get(key)
        if value is None and rows_alone:
            # The rows have covered everything so far: their maximum bounds the entries of the other dimensions.
            rows = loaded[first]
            value = (rows.max() if rows.numel() else rows.new_zeros(())).expand(shape)
        if value is not None:
            yield i, _adopt(value, shape, accumulator_dtype(param.dtype), param, f"{key} of {label}")


def is_of_rows_alone(loaded: Mapping[str, Any], shard: LocalShard) -> bool:
    """Whether a loaded state is that of sparse gradients, as torch-SM3 has it."""
    keys = accumulator_keys(shard)
    return shard.layout == WHOLE and shard.cover_block is None and [key for key in loaded if key in keys] == keys[:1]


def check_accumulators(loaded: Mapping[str, Any], shard: LocalShard, label: str) -> None:
    """Refuse a loaded state that has other accumulators, or some of them: of another optimizer, or other covers.

    Raises:
        ValueError: says which it has.
    """
    keys, found = accumulator_keys(shard), [key for key in loaded if key.startswith("accumulator_")]
    if loaded and sorted(found) != keys and "cover_minimum" not in loaded and not is_of_rows_alone(loaded, shard):
        raise ValueError(
            f"the loaded state of {label} has {', '.join(loaded)}, but this optimizer needs {', '.join(keys)}. It was "
            "saved by another optimizer, by another recipe, or with another cover_block."
        )


def mend_state(
    state: State, param: Tensor, shards: Sequence[LocalShard], label: str, momentum_dtype: torch.dtype | None
) -> None:
    """Bring what somebody put into a state into the types and layout of this optimizer. What fits stays as it is.

    Raises:
        ValueError: if a tensor does not have the shape that this rank stores.
    """
    for key, fitting in adopt_state(state, param, shards, label, momentum_dtype).items():
        if not _alike(state.get(key), fitting):
            state[key] = fitting


def _alike(value: Any, fitting: Tensor) -> bool:
    """Whether a tensor can take the place of one that fits."""
    if not isinstance(value, Tensor) or is_dtensor(value) != is_dtensor(fitting):
        return False
    forms = []
    for each in (value, fitting):
        local, cut = local_tensor(each), (each.device_mesh, each.placements) if is_dtensor(each) else ()
        forms.append((each.shape, cut, local.dtype, local.device, local.shape, local.stride(), local.layout))
    return bool(forms[0] == forms[1])


def square_averages(state: State, shards: Sequence[LocalShard], names: Sequence[str]) -> dict[str, int]:
    """The averages of squares in the state of a flattened parameter, by the names of its original tensors.

    FSDP1 has no place for a number of each tensor in a state, but hands on what else is in a param group.
    """
    keys = [square_average_key(shard) for shard in shards]
    return {name: int(state[key].item()) for name, key in zip(names, keys, strict=True) if key in state}


def with_square_averages(
    loaded: Mapping[str, Any], group: Mapping[str, Any], shards: Sequence[LocalShard], names: Sequence[str], label: str
) -> State:
    """A loaded state of a flattened parameter, with what :func:`square_averages` took from it to the loaded group.

    Raises:
        ValueError: if the average of one of the tensors is missing.
    """
    averages = group.get(SQUARE_AVERAGES, {})
    missing = [name for name in names if name not in averages]
    if loaded and missing and group.get("update_rms") is not None:
        raise ValueError(
            f"the loaded param group of {label} was saved with update_rms={group['update_rms']}, but its "
            f"{SQUARE_AVERAGES} have nothing of {', '.join(missing[:5])}. They have "
            f"{', '.join(list(averages)[:5]) or 'nothing'}: it is the state of another model, or what gathered it left "
            "them out. Save with sm3_dist.checkpoint.get_optimizer_state_dict(model, optimizer)."
        )
    keys = [square_average_key(shard) for shard in shards]
    return {**loaded, **{key: averages[name] for key, name in zip(keys, names, strict=True) if name in averages}}


def parameter_shaped(state: State, param: Tensor, shards: Sequence[LocalShard]) -> State:
    """The state in a form where every tensor has the shape of the parameter or none, as FSDP1 and fairscale want it.

    They also want one type for all of them: narrower momentum comes in that of the accumulators, which is exact.
    Averages of squares, a number for each of several tensors, are not in it: see :func:`square_averages`.
    """
    minimum = _zeros(param, shards, accumulator_dtype(param.dtype))
    for shard in shards:
        write_minimum(shard, held_accumulators(state, shard), minimum)
    shaped = {"step": state["step"], "cover_minimum": minimum}
    for key in (MOMENTUM_BUFFER, MOMENTUM_CODE):
        if key in state:
            shaped[MOMENTUM_BUFFER] = converted(state[key], minimum.dtype)
    return shaped


def with_copies(state: State) -> State:
    """A state whose accumulators are copies: those that ``shard_covers`` spreads have no memory between steps."""
    return {key: value.clone() if key.startswith("accumulator_") else value for key, value in state.items()}


def as_tensor(value: Tensor | float) -> Tensor:
    """A tensor as it is, a number as a tensor on the CPU that holds it exactly.

    Example:
        >>> as_tensor(3), as_tensor(0.5).dtype
        (tensor(3), torch.float64)
    """
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64, device="cpu")


def step_device(param: Tensor) -> torch.device:
    """Where steps are counted: on a GPU beside the parameter, so that the host need not ask it; else on the host."""
    device = local_tensor(param).device
    return device if device.type == "cuda" else torch.device("cpu")


def _zeros(param: Tensor, shards: Sequence[LocalShard], dtype: torch.dtype) -> Tensor:
    """One value for each element that this rank updates."""
    if any(shard.replicated for shard in shards):
        return torch.zeros(sum(shard.numel for shard in shards), dtype=dtype, device=param.device)
    if shards[0].flat_numel is not None:  # the parameter itself may be gathered at present
        return torch.zeros(shards[0].flat_numel, dtype=dtype, device=param.device)
    return torch.zeros_like(param, dtype=dtype, requires_grad=False)


def _local_shape(param: Tensor, shard: LocalShard, i: int) -> tuple[int, ...]:
    """A vector over the indices of dimension ``i``; a scalar for a scalar."""
    return () if param.dim() == 0 and shard.boxes else shard.accumulator_shape(i)


def _adopt(value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, param: Tensor, label: str) -> Tensor:
    plain = local_tensor(value)
    squeezed = [n for n in plain.shape if n != 1]
    if squeezed != [n for n in shape if n != 1]:
        raise ValueError(
            f"{label} has shape {tuple(plain.shape)} in the loaded state, but this rank stores {shape}. It was saved "
            "by a model of other shapes, with other param groups, by another rank, or under another layout or number "
            "of ranks. state_dict() has what one rank holds: sm3_dist.checkpoint saves what every layout can load."
        )
    return plain.detach().to(local_tensor(param).device, dtype, copy=True).reshape(shape)
