"""What each rank will hold of each parameter under a wrapper, reckoned before there is any."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sm3_dist.layout.box import Box, bounding, flat_boxes, overlaps
from sm3_dist.layout.cover import cell, grid, touched
from sm3_dist.layout.flat_metadata import Original, held
from sm3_dist.layout.ranges import Range
from sm3_dist.layout.shard import Chunk, LocalShard
from sm3_dist.layout.zero import Partition

WRAPPERS = ("none", "ddp", "zero1", "fsdp2", "hsdp", "tp", "fsdp1", "fairscale")
"""One process; DistributedDataParallel, alone and with ``SM3(shard_over=)``; ``fully_shard`` over all ranks, and over
those of each replica; tensor parallel; torch's FullyShardedDataParallel and fairscale's."""

REPLICATED = ("none", "ddp", "zero1")
"""Wrappers that leave every parameter whole on every rank."""

_ALIGNED = 16
"""Bytes at whose multiples FSDP1 lets each tensor begin (with ``use_orig_params=True``)."""


@dataclass(frozen=True)
class Pieces:
    """One parameter, and what every rank updates of it.

    Attributes:
        param: the parameter, with its original shape.
        boxes: for each rank the boxes.
        extents: for each rank the extent of its boxes.
        axis: the dimension that is cut, where every rank has its chunk of that; entries of the accumulator of that
            dimension then have one owner each.
        replicated: whether every rank updates all of it, and all do the same.
        unit: number of the module that is gathered together with this parameter.
        counted: whether the optimizer counts its steps; not for all but one of the tensors in a flat parameter.
        padding: for each rank the elements of a flat parameter beside those of its tensors.
    """

    param: Tensor
    boxes: Sequence[tuple[Box, ...]]
    extents: Sequence[Box]
    axis: int | None = None
    replicated: bool = False
    unit: int = 0
    counted: bool = True
    padding: Sequence[int] = ()

    def shards(self, cover_block: int | None) -> list[LocalShard]:
        """For each rank what it holds."""
        shape = _shape(self.param)
        whole = LocalShard(shape, (), cover_block=cover_block)
        by_accumulator = [self._chunks(i, cover_block) for i in range(whole.accumulator_count)]
        return [
            LocalShard(shape, boxes, extent=extent, cover_block=cover_block, chunks=chunks)
            for boxes, extent, chunks in zip(self.boxes, self.extents, zip(*by_accumulator, strict=True), strict=True)
        ]

    def _chunks(self, i: int, cover_block: int | None) -> list[Chunk] | list[None]:
        """For each rank what its state holds of accumulator ``i``; ``None`` if every rank works on just that."""
        nothing = [None] * len(self.extents)
        if cover_block is None or self.axis is None:
            return nothing
        whole = Box.whole(grid(_shape(self.param), i, cover_block))
        length = -(-whole.stop[self.axis] // len(self.extents))
        boxes = [whole.along(self.axis, r * length, (r + 1) * length) for r in range(len(self.extents))]
        cells = cell(_shape(self.param), i, cover_block)
        needed = [touched(extent, cells) for extent in self.extents]
        if all(a == b or not (a.numel or b.numel) for a, b in zip(boxes, needed, strict=True)):
            return nothing
        return [Chunk(box) for box in boxes]

    def lent(self, i: int, shards: Sequence[LocalShard], rank: int) -> int:
        """How many entries of accumulator ``i`` a rank sends to those whose states hold them, though it needs them."""
        if shards[0].chunks[i] is None or self.axis is None:
            return 0
        mine, length = shards[rank].stored[i], max(1, shards[0].held[i].shape[self.axis])
        others = range(mine.start[self.axis] // length, -(-mine.stop[self.axis] // length) if mine.numel else 0)
        return sum(
            (piece & mine).numel for other in others for piece in shards[other].held[i].without(shards[other].stored[i])
        )

    def shared(self, i: int, cover_block: int | None) -> tuple[Box, ...]:
        """The entries of accumulator ``i`` that several ranks touch, where they do not compute the same thing."""
        if self.replicated or (cover_block is None and i == self.axis):
            return ()
        holding = [e for e, b in zip(self.extents, self.boxes, strict=True) if self.axis is not None or b]
        cells = cell(_shape(self.param), i, cover_block)
        return overlaps([touched(extent, cells) for extent in holding])


def rank_shards(
    module: nn.Module,
    wrapper: str,
    ranks: int,
    units: Collection[nn.Module] = (),
    tensor_parallel: Mapping[str, int] | None = None,
) -> Iterator[Pieces]:
    """Each parameter of a model with what every rank updates of it.

    Args:
        module: the model, not wrapped.
        wrapper: one of :data:`WRAPPERS`.
        ranks: how many share it; for HSDP those of one replica.
        units: the submodules that are wrapped one by one, before the root.
        tensor_parallel: for ``"tp"`` the dimension in which each parameter is cut, by name; others are replicated.

    Raises:
        ValueError: if a module that is flattened has parameters of several types.
    """
    if wrapper == "zero1":
        yield from _ranges(list(module.parameters()), ranks)
    elif wrapper in ("fsdp1", "fairscale"):
        for number, params in enumerate(_by_unit(module, units)):
            yield from _flat(params, ranks, number, separate=wrapper == "fsdp1")
    elif wrapper in ("fsdp2", "hsdp"):
        for number, params in enumerate(_by_unit(module, units)):
            yield from (_along(param, 0, ranks, number) for param in params)
    else:
        names = tensor_parallel or {}
        for number, (name, param) in enumerate(module.named_parameters()):
            yield _along(param, names.get(name) if wrapper == "tp" else None, ranks, number)


def _along(param: Tensor, axis: int | None, ranks: int, unit: int) -> Pieces:
    """Cut along a dimension as ``torch.chunk`` does, or not at all."""
    whole = Box.whole(_shape(param))
    if axis is None:
        return Pieces(param, [(whole,)] * ranks, [whole] * ranks, replicated=True, unit=unit)
    length = -(-whole.stop[axis] // ranks)
    extents = [whole.along(axis, r * length, (r + 1) * length) for r in range(ranks)]
    return Pieces(param, [(box,) if box.numel else () for box in extents], extents, axis=axis, unit=unit)


def _ranges(params: Sequence[Tensor], ranks: int) -> Iterator[Pieces]:
    """Cut the concatenation of the parameters of each type as ``shard_over=`` does."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for param in params:
        if param.requires_grad:
            alike.setdefault((param.dtype, param.device), []).append(param)
        else:
            yield _in_ranges(param, [(0, 0)] * ranks)
    for trained in alike.values():
        partition = Partition(trained, ranks)
        for index, param in enumerate(trained):
            yield _in_ranges(param, partition.ranges(index))


def _flat(params: Sequence[Tensor], ranks: int, unit: int, separate: bool) -> Iterator[Pieces]:
    """Lay parameters one after another, and cut that in equal parts.

    Args:
        params: of one unit.
        ranks: how many parts.
        unit: its number.
        separate: whether the optimizer sees a parameter for each tensor (``use_orig_params=True``) or the flat one.
    """
    types = {param.dtype for param in params}
    if len(types) > 1:
        names = ", ".join(sorted(map(str, types)))
        raise ValueError(f"a module that is flattened has parameters of one type, but these have {names}")
    position, originals = 0, []
    for param in params:
        if separate:  # torch lets each begin at a whole multiple
            position += -position % (_ALIGNED // param.element_size())
        originals.append(Original("", _shape(param), position))
        position += param.numel()
    part = -(-position // ranks)
    cut = [[held(original, part, rank) for rank in range(ranks)] for original in originals]
    for k, (param, ranges) in enumerate(zip(params, cut, strict=True)):
        last, padding = k == len(params) - 1, []
        if last and not separate:
            padding = [part - sum(b - a for a, b in (each[rank] for each in cut)) for rank in range(ranks)]
        yield _in_ranges(param, ranges, unit, counted=separate or last, padding=padding)


def _in_ranges(
    param: Tensor, ranges: Sequence[Range], unit: int = 0, counted: bool = True, padding: Sequence[int] = ()
) -> Pieces:
    shape = _shape(param)
    boxes = [tuple(flat_boxes(shape, *elements)) for elements in ranges]
    extents = [bounding(each, len(shape)) for each in boxes]
    return Pieces(param, boxes, extents, unit=unit, counted=counted, padding=padding)


def _by_unit(module: nn.Module, units: Collection[nn.Module]) -> list[list[nn.Parameter]]:
    """The parameters that are wrapped together: those of each unit, innermost first, then what is left in the root."""
    seen: set[nn.Parameter] = set()
    result = []
    for unit in [each for each in reversed(list(module.modules())) if each in units and each is not module] + [module]:
        fresh = [param for param in unit.parameters() if param not in seen]
        seen.update(fresh)
        if fresh:
            result.append(fresh)
    return result


def _shape(param: Tensor) -> tuple[int, ...]:
    return tuple(param.shape) or (1,)
