"""What wrappers keep about the tensors that they flattened, in one form for all of them.

Nothing else in this package reads private attributes of torch's FullyShardedDataParallel and of fairscale. They are
checked before use, so a release that renames one gives an error that names it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from sm3_dist.layout.kinds import is_fsdp1
from sm3_dist.layout.shard import Peers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.fsdp import FullyShardedDataParallel

# The attributes that are read, by package and by the object that has them.
_TORCH_MODULE = ("_handle",)
_TORCH_HANDLE = ("flat_param", "process_group", "uses_sharded_strategy", "_use_orig_params")
_TORCH_FLAT_TENSOR = ("_numels_with_padding", "_is_padding_mask", "_sharded_size", "_shard_param_infos")
_TORCH_ORIGINALS = (
    "_fqns",
    "_shapes",
    "_strides",
    "_contiguities",
    "_params",
    "_param_extensions",
    "_shared_param_infos",
    "_shard_param_infos",
)
_TORCH_INFO = ("in_shard", "offset_in_shard", "intra_param_start_idx", "intra_param_end_idx")
_FAIRSCALE_MODULE = ("params", "process_group", "_num_flatten_params", "_param_name_groups")
_FAIRSCALE_PARAM = ("_is_sharded", "_orig_size")
_FAIRSCALE_ORIGINALS = ("_param_infos", "_param_shapes", "_shared_param_infos")

INNER = ("_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_orig_mod")
"""Names under which wrappers hold what they wrap: FSDP1 and fairscale, activation checkpointing, compile."""


@dataclass(frozen=True)
class Original:
    """An original tensor within a flat one.

    Attributes:
        name: its name in the root module.
        shape: its shape.
        order: its dimensions in the order in which they lie in memory; ``None`` where that is ``0, 1, …``.
        start: position of its first element in the flat tensor.
        param: the parameter of the optimizer that stands for it alone; ``None`` where the flat tensor does.
        extension: whether it is itself the shard of a larger tensor.
        aliases: further names under which the model has it (tied weights).
    """

    name: str
    shape: tuple[int, ...]
    start: int
    order: tuple[int, ...] | None = None
    param: Tensor | None = None
    extension: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class FlatTensor:
    """A flat tensor that a wrapper made of original ones, padded, and cut into equal parts, one for each rank.

    Attributes:
        param: the wrapper's parameter, of which this rank usually holds its part.
        originals: what it consists of, in the order of their positions.
        part: number of elements of a part, padding included.
        peers: the ranks that have a part each, in this order; ``None`` where every rank holds the whole.
        rank: the number of this rank's part.
        wrapper: what error messages call the wrapper.
        gathers_idle: whether ``param`` may hold the whole at a step, if it has no gradient.
    """

    param: Tensor
    originals: tuple[Original, ...]
    part: int
    peers: Peers | None
    rank: int
    wrapper: str
    gathers_idle: bool = False

    @property
    def gathered(self) -> bool:
        """Whether the wrapper has gathered the whole, so that what ``param`` holds is no part to be updated."""
        idle = self.gathers_idle and self.param.grad is None
        return self.param.numel() != self.part and not idle


def is_flattened(param: Tensor) -> bool:
    """Whether a wrapper took the original shape from this parameter (or may do so at any time)."""
    marks = ("_fsdp_flattened", "_is_flat_param", "_is_sharded")
    return any(getattr(param, mark, False) for mark in marks) or type(param).__name__ == "FlatParameter"


def flat_tensors(model: nn.Module) -> Iterator[FlatTensor]:
    """Every flat tensor in ``model``.

    Raises:
        RuntimeError: if the installed wrapper does not keep what this package reads.
    """
    fairscale = sys.modules.get("fairscale.nn.data_parallel.fully_sharded_data_parallel")
    for path, module in model.named_modules():
        if is_fsdp1(module):
            yield from _of_torch(clean(path), module)
        elif fairscale is not None and isinstance(module, fairscale.FullyShardedDataParallel):
            yield from _of_fairscale(clean(path), module)


def _of_torch(path: str, module: FullyShardedDataParallel) -> Iterator[FlatTensor]:
    handle: Any = _check(module, _TORCH_MODULE, "torch")._handle
    if handle is None:  # other wrappers inside have all the parameters
        return
    flat: Any = _check(handle, _TORCH_HANDLE, "torch").flat_param
    _check(flat, (*_TORCH_FLAT_TENSOR, *_TORCH_ORIGINALS), "torch")
    originals = _originals_of_torch(path, flat, handle._use_orig_params)
    part = flat._sharded_size.numel()
    peers, rank = _place(handle.process_group if handle.uses_sharded_strategy else None)
    _check_reckoning(originals, flat._shard_param_infos, part, rank)
    yield FlatTensor(flat, originals, part, peers, rank, "FullyShardedDataParallel of torch")


def _originals_of_torch(path: str, flat: Any, separate: bool) -> tuple[Original, ...]:
    """What a flat parameter consists of; ``separate``: whether the optimizer sees a parameter for each."""
    starts, position = [], 0
    for numel, is_padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
        if not is_padding:
            starts.append(position)
        position += numel
    return tuple(
        Original(
            _join(path, name),
            tuple(flat._shapes[i]),
            starts[i],
            None if flat._contiguities[i] else _memory_order(flat._shapes[i], flat._strides[i], name),
            flat._params[i] if separate else None,
            flat._param_extensions[i] is not None,
            tuple(
                _join(path, tied.module_name, tied.param_name)
                for tied in flat._shared_param_infos
                if _join(tied.prim_module_name, tied.prim_param_name) == clean(name)
            ),
        )
        for i, name in enumerate(flat._fqns)
    )


def _check_reckoning(originals: Sequence[Original], infos: Sequence[Any], part: int, rank: int) -> None:
    """Raise unless torch says that part number ``rank`` holds of each original tensor what :func:`held` says."""
    for original, info in zip(originals, infos, strict=True):
        _check(info, _TORCH_INFO, "torch")
        expected = held(original, part, rank)
        if info.in_shard and original.numel:
            kept = (info.intra_param_start_idx, info.intra_param_end_idx + 1)
            offset = max(0, original.start - rank * part)
        else:
            kept, offset = (0, 0), info.offset_in_shard
        if (kept, info.offset_in_shard) != (expected, offset):
            raise RuntimeError(
                f"torch {metadata.version('torch')} says that rank {rank} holds elements {kept} of {original.name}, "
                f"and sm3_dist reckons {expected}: this version lays out flat parameters in a way not known here."
            )


def _of_fairscale(path: str, module: Any) -> Iterator[FlatTensor]:
    _check(module, _FAIRSCALE_MODULE, "fairscale")
    # Parameters without a name belong to another wrapper, which shares them with this one.
    for k, (param, names) in enumerate(zip(module.params, module._param_name_groups, strict=False)):
        _check(param, _FAIRSCALE_PARAM, "fairscale")
        separate = k >= module._num_flatten_params
        if separate:
            shapes, tied = [param._orig_size], []
        else:
            _check(param, _FAIRSCALE_ORIGINALS, "fairscale")
            names = [_join(inner, name) for inner, _, name in param._param_infos]
            shapes = param._param_shapes
            # module and name where it occurs again; the module's name and the name where it occurs first
            tied = [(_join(m, n), _join(first, n0)) for m, first, _, n, _, n0 in param._shared_param_infos]
        originals, position = [], 0
        for name, shape in zip(names, shapes, strict=True):
            aliases = tuple(_join(path, again) for again, first in tied if first == clean(name))
            alone = param if separate else None
            original = Original(_join(path, name), tuple(shape), position, param=alone, aliases=aliases)
            originals.append(original)
            position += original.numel
        peers, rank = _place(module.process_group if param._is_sharded else None)
        part = -(-position // (len(peers.ranks) if peers is not None else 1))
        wrapper = "FullyShardedDataParallel of fairscale"
        yield FlatTensor(param, tuple(originals), part, peers, rank, wrapper, gathers_idle=True)


def _place(group: ProcessGroup | None) -> tuple[Peers | None, int]:
    """The ranks that have a part each, and which this rank is among them."""
    if group is None:
        return None, 0
    try:
        ranks = tuple(dist.get_process_group_ranks(group))
    except KeyError:
        raise ValueError(
            "the model was wrapped over a process group that does not exist any more: torch.distributed was left or "
            "initialized anew since. Wrap the model again, and make a new optimizer of its parameters."
        ) from None
    return Peers(ranks, lambda: group), group.rank()


def held(original: Original, part: int, rank: int) -> tuple[int, int]:
    """The elements ``[start, stop)`` of an original tensor that part number ``rank`` holds; ``(0, 0)`` for none."""
    start = max(0, rank * part - original.start)
    stop = min(original.numel, (rank + 1) * part - original.start)
    return (start, stop) if start < stop else (0, 0)


def _memory_order(shape: Sequence[int], stride: Sequence[int], name: str) -> tuple[int, ...]:
    """The dimensions of a strided tensor, from the one with the largest steps to the one with the smallest."""
    order = sorted(range(len(shape)), key=lambda d: (shape[d] > 1, -stride[d]))
    step = 1
    for d in reversed(order):
        if shape[d] > 1 and stride[d] != step:
            raise ValueError(
                f"{name} of shape {tuple(shape)} had strides {tuple(stride)} when it was wrapped: its elements overlap "
                "or have gaps, and flattening it took others. Make it contiguous before wrapping the model."
            )
        step *= shape[d]
    return tuple(order)


def _check(holder: Any, names: Sequence[str], package: str) -> Any:
    """``holder``, if it has these attributes."""
    missing = [name for name in names if not hasattr(holder, name)]
    if missing:
        raise RuntimeError(
            f"{package} {metadata.version(package)} keeps no {', '.join(missing)} on a {type(holder).__name__}, where "
            "sm3_dist reads the original shapes of flattened parameters. Install another version of either."
        )
    return holder


def clean(name: str) -> str:
    """A module's or parameter's name without the wrappers on the way."""
    return ".".join(word for word in name.split(".") if word not in INNER)


def _join(*names: str) -> str:
    return ".".join(word for word in map(clean, names) if word)
