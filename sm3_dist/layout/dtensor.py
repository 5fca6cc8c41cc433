"""DTensor parameters: FSDP2 (``fully_shard``), HSDP, tensor parallel and their combinations.

A mesh dimension that shards tensor dimension ``d`` cuts every row of the other dimensions, so accumulator ``i`` is a
maximum over all mesh dimensions that shard a dimension other than ``i``. Over the remaining ones it is already right:
it is itself a DTensor, sharded where the parameter is sharded along ``i`` and replicated elsewhere.

With block covers an accumulator is a DTensor of the shape of its grid, with the placements of the parameter. Only the
blocks that an edge of a shard cuts are maxima over several ranks. Neighbours both need such a block, which a DTensor
cannot say. So where an edge cuts one, what PyTorch's chunking of the grid gives a rank is not what its elements need:
the state holds the one, and the rank works on the other (:class:`~sm3_dist.layout.shard.Chunk`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial, wraps
from itertools import product
from typing import Any, Concatenate, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from sm3_dist.compat import guard_strided_shards, redistributes_to_strided_shards, same_placements
from sm3_dist.layout.box import Box, overlaps
from sm3_dist.layout.cover import Cell, accumulator_count, cell, grid, touched
from sm3_dist.layout.groups import group_of
from sm3_dist.layout.shard import Chunk, Elsewhere, Holdings, LocalShard, Peers, Shared, in_words

P = ParamSpec("P")
T = TypeVar("T")
Run = tuple[int, int]
"""Indices ``[start, stop)`` of one tensor dimension."""

guard_strided_shards()


def describe(param: Tensor, label: str, cover_block: int | None) -> tuple[LocalShard, ...]:
    """One box: the product of the index ranges that the placements leave this rank."""
    assert isinstance(param, DTensor)
    cut = _Cut.of(param)
    _refuse_unsupported(cut.placements, label)
    here = param.device_mesh.get_coordinate()
    if here is None:
        raise ValueError(
            f"{label}: this rank is not part of its mesh of ranks {in_words(_ranks(param.device_mesh))}. "
            "Leave the parameter out here."
        )
    runs = [_held(cut, dim, tuple(here)) for dim in range(len(cut.shape))]
    for dim, separate in enumerate(runs):
        if len(separate) > 1:
            raise NotImplementedError(
                f"{label}: placements {cut.placements} give this rank the separate ranges {list(separate)} of "
                f"dimension {dim}. SM3 takes contiguous shards; redistribute the parameter to Shard placements."
            )
    box = _box(cut, tuple(here))
    _check_local(param, cut, box, label)
    mesh = param.device_mesh
    sharding = cut.dims_that_shard(lambda dim: True)
    count = accumulator_count(cut.shape, cover_block)
    return (
        LocalShard(
            cut.shape,
            boxes=(box,) if box.numel else (),
            extent=box,
            shared=tuple(_shared(cut, i, cover_block, mesh) for i in range(count)),
            chunks=tuple(_chunk_of(cut, i, cover_block, mesh) for i in range(count)),
            ranks=_ranks(mesh),
            layout=_layout(mesh, cut.placements),
            cover_block=cover_block,
            holders=_peers(mesh, sharding) if sharding else None,
            holdings=Holdings(_peers(mesh, sharding), partial(_holdings, cut, mesh, sharding)) if sharding else None,
            replicas=_members(mesh, tuple(d for d in range(mesh.ndim) if d not in sharding), tuple(here)),
        ),
    )


def _check_local(param: DTensor, cut: _Cut, box: Box, label: str) -> None:
    """Raise unless the local tensor has the shape that the placements give this rank."""
    local = tuple(param.to_local().shape) if param.dim() else box.shape
    # (What is cut along two dimensions, and along one of them into nothing, torch may leave with other zeros in it.)
    if local != box.shape and (box.numel or param.to_local().numel()):
        raise ValueError(
            f"{label}: the local tensor has shape {local}, but placements {cut.placements} on "
            f"a mesh of shape {cut.sizes} give this rank {box.shape} of {cut.shape}. Make the DTensor with the shape "
            "and stride of the whole tensor (DTensor.from_local(..., shape=, stride=))."
        )


def _holdings(cut: _Cut, mesh: DeviceMesh, dims: tuple[int, ...]) -> dict[int, tuple[Box, ...]]:
    """What the ranks hold that differ from this one in ``dims`` alone."""
    boxes = {int(mesh.mesh[at]): _box(cut, at) for at in _among(cut, dims, tuple(mesh.get_coordinate() or ()))}
    return {rank: (box,) if box.numel else () for rank, box in boxes.items()}


def accumulator(param: DTensor, part: Tensor, shard: LocalShard, i: int) -> Tensor:
    """Accumulator ``i`` of a DTensor parameter, whose local part is ``part``: a DTensor.

    It has shape ``(n_i,)``, or that of the grid with block covers.
    """
    cut = _cut_of_accumulator(_Cut.of(param), i, shard.cover_block)
    stride = torch.empty(cut.shape, dtype=param.dtype, device="meta").stride()
    return _from_local(part, param.device_mesh, cut.placements, torch.Size(cut.shape), stride)


def cut_like(grad: DTensor, param: DTensor) -> DTensor:
    """A gradient, cut as its parameter is: a collective where it is cut otherwise or still a sum over ranks."""
    mesh, placements = param.device_mesh, param.placements
    if same_placements(grad.placements, placements):
        return grad
    strided = any(isinstance(placement, _StridedShard) for placement in placements)
    if not strided or redistributes_to_strided_shards():
        return grad.redistribute(mesh, placements)
    whole = grad.redistribute(mesh, [Replicate()] * mesh.ndim).to_local()
    box = _box(_Cut.of(param), tuple(mesh.get_coordinate() or ()))
    part = whole[tuple(map(slice, box.start, box.stop))].contiguous()
    return _from_local(part, mesh, placements, param.shape, param.stride())


def _from_local(
    part: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: torch.Size, stride: tuple[int, ...]
) -> DTensor:
    """A DTensor whose part on this rank is ``part``, or holds the same where it is.

    FSDP2 with an offload policy keeps parameters on the CPU under a mesh of GPUs. ``DTensor.from_local`` would bring a
    part there to the GPU, but leaves one without memory.
    """
    here = part.device.type == mesh.device_type
    local = part if here else part.to("meta")
    made = DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
    if here:
        return made
    offloaded = cast(DTensor, torch.empty_like(made, device=part.device))
    offloaded.to_local().copy_(part)
    return offloaded


@dataclass(frozen=True)
class _Cut:
    """How a tensor is cut: all that the index ranges of every rank follow from."""

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    placements: tuple[Placement, ...]

    @classmethod
    def of(cls, param: DTensor) -> _Cut:
        return cls(tuple(param.shape) or (1,), tuple(param.device_mesh.shape), tuple(param.placements))

    def dims_that_shard(self, which: Callable[[int], bool]) -> tuple[int, ...]:
        """The mesh dimensions that shard a tensor dimension of which ``which`` is true."""
        return tuple(
            mesh_dim
            for mesh_dim, placement in enumerate(self.placements)
            if _cuts(placement) and self.sizes[mesh_dim] > 1 and which(placement.dim)  # type: ignore[attr-defined]
        )

    def coordinates(self) -> Iterable[tuple[int, ...]]:
        """The coordinate of each rank in the mesh."""
        return product(*map(range, self.sizes))


def _cut_of_accumulator(cut: _Cut, i: int, block: int | None) -> _Cut:
    """How the state tensor of accumulator ``i`` is cut: as the parameter."""
    if block is None:
        return _Cut((cut.shape[i],), cut.sizes, tuple(_along(placement, i) for placement in cut.placements))
    blocks = replace(cut, shape=grid(cut.shape, i, block))
    if _blocks_follow_shards(cut, blocks, i, block):
        return blocks
    # PyTorch puts tensors with strided shards of uneven length together wrongly; and these lie askew in any case.
    cells = cell(cut.shape, i, block)
    return replace(blocks, placements=tuple(_plain(placement, cells) for placement in cut.placements))


@lru_cache(maxsize=4096)
def _blocks_follow_shards(cut: _Cut, blocks: _Cut, i: int, block: int) -> bool:
    """Whether a grid cut like this gives every rank exactly the entries that its elements need."""
    cells = cell(cut.shape, i, block)
    needed = ((touched(_box(cut, here), cells), _box(blocks, here)) for here in cut.coordinates())
    return all(a == b or not (a.numel or b.numel) for a, b in needed)


def _plain(placement: Placement, cells: Cell) -> Placement:
    strided = isinstance(placement, _StridedShard) and cells[placement.dim] != 1
    return Shard(placement.dim) if strided else placement  # type: ignore[attr-defined]


def _along(placement: Placement, i: int) -> Placement:
    """Where the entries of accumulator ``i`` lie over one mesh dimension."""
    if not _cuts(placement) or placement.dim != i:  # type: ignore[attr-defined]
        return Replicate()
    if isinstance(placement, _StridedShard):
        return _StridedShard(0, split_factor=placement.split_factor)
    return Shard(0)


def _cuts(placement: Placement) -> bool:
    return isinstance(placement, (Shard, _StridedShard))


def _refuse_unsupported(placements: Sequence[Placement], label: str) -> None:
    for placement in placements:
        if not _cuts(placement) and not isinstance(placement, Replicate):
            raise ValueError(
                f"{label} has placement {placement}: each rank holds a summand of the weight, not a part of it, and an "
                "element-wise update of summands is wrong. Redistribute the parameter to Shard or Replicate first."
            )


def _box(cut: _Cut, coordinate: tuple[int, ...]) -> Box:
    """What the rank at this coordinate of the mesh holds, its ranges being contiguous."""
    ranges = [_held(cut, dim, coordinate) or ((n, n),) for dim, n in enumerate(cut.shape)]
    return Box(tuple(runs[0][0] for runs in ranges), tuple(runs[-1][1] for runs in ranges))


@lru_cache(maxsize=1 << 16)
def _held(cut: _Cut, dim: int, coordinate: tuple[int, ...]) -> tuple[Run, ...]:
    """The indices of one tensor dimension that the rank at this coordinate of the mesh holds."""
    runs: list[Run] = [(0, cut.shape[dim])]
    for placement, size, index in zip(cut.placements, cut.sizes, coordinate, strict=True):
        if not _cuts(placement) or placement.dim != dim:  # type: ignore[attr-defined]
            continue
        # A strided shard was cut by a mesh dimension further right before: FSDP2 cuts what tensor parallel left.
        pieces = _split(runs, int(placement.split_factor)) if isinstance(placement, _StridedShard) else [runs]
        runs = _merged([run for piece in pieces for run in _chunk(piece, size, index)])
    return tuple(runs)


def _split(runs: Sequence[Run], parts: int) -> list[list[Run]]:
    """Cut the indices into ``parts`` chunks of equal size but for the last ones, as ``torch.chunk`` does."""
    return [_chunk(runs, parts, k) for k in range(parts)]


def _chunk(runs: Sequence[Run], parts: int, index: int) -> list[Run]:
    """One of these chunks."""
    total = sum(b - a for a, b in runs)
    size = -(-total // parts)
    return _take(runs, min(total, index * size), min(total, (index + 1) * size))


def _take(runs: Sequence[Run], start: int, stop: int) -> list[Run]:
    taken, position = [], 0
    for a, b in runs:
        lo, hi = max(start - position, 0), min(stop - position, b - a)
        if lo < hi:
            taken.append((a + lo, a + hi))
        position += b - a
    return taken


def _merged(runs: Sequence[Run]) -> list[Run]:
    merged: list[Run] = []
    for a, b in runs:
        if merged and merged[-1][1] == a:
            merged[-1] = (merged[-1][0], b)
        else:
            merged.append((a, b))
    return merged


def _shared(cut: _Cut, i: int, block: int | None, mesh: DeviceMesh) -> Shared | None:
    """Accumulator ``i`` is a maximum over the mesh dimensions that shard what it does not tell apart."""
    cells = cell(cut.shape, i, block)
    dims = cut.dims_that_shard(lambda dim: cells[dim] != 1)
    if not dims:
        return None
    here = tuple(mesh.get_coordinate() or ())
    if block is None:  # the peers hold the same indices of dimension i, so they touch the same entries
        whole = touched(_box(cut, here), cells)
        regions: tuple[Box, ...] = (whole,) if whole.numel else ()
    else:
        regions = _overlaps(cut, i, block, _among(cut, dims, here))
    return Shared(_peers(mesh, dims), regions) if regions else None


def _chunk_of(cut: _Cut, i: int, block: int | None, mesh: DeviceMesh) -> Chunk | None:
    """What the state holds of accumulator ``i``, unless that is what this rank works on."""
    if block is None:
        return None
    blocks = _cut_of_accumulator(cut, i, block)
    if _blocks_follow_shards(cut, blocks, i, block):
        return None
    here = tuple(mesh.get_coordinate() or ())
    cells = cell(cut.shape, i, block)
    dims = cut.dims_that_shard(lambda dim: cells[dim] != 1)
    peers = _peers(mesh, dims)
    members = {int(mesh.mesh[coordinate]): coordinate for coordinate in _among(cut, dims, here)}
    lent, borrowed, any_at_all = _askew(cut, blocks, i, block, here, tuple(members[rank] for rank in peers.ranks))
    return Chunk(_box(blocks, here), Elsewhere(peers, lent, borrowed) if any_at_all else None)


Pieces = tuple[tuple[Box, ...], ...]


@lru_cache(maxsize=4096)
def _askew(
    cut: _Cut, blocks: _Cut, i: int, block: int, here: tuple[int, ...], peers: tuple[tuple[int, ...], ...]
) -> tuple[Pieces, Pieces, bool]:
    """For each peer what it borrows of this rank, and what it lends to it; and whether any of them borrows anything."""
    cells = cell(cut.shape, i, block)
    needed = {peer: touched(_box(cut, peer), cells) for peer in peers}
    beyond = {peer: _box(blocks, peer).without(needed[peer]) for peer in peers}

    def common(boxes: Sequence[Box], other: Box) -> tuple[Box, ...]:
        return tuple(piece for box in boxes if (piece := box & other).numel)

    lent = tuple(common(beyond[peer], needed[here]) for peer in peers)
    borrowed = tuple(common(beyond[here], needed[peer]) for peer in peers)
    return lent, borrowed, any(beyond.values())


def _among(cut: _Cut, dims: tuple[int, ...], here: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The coordinates that differ from ``here`` in ``dims`` alone."""
    return tuple(product(*(range(size) if d in dims else (here[d],) for d, size in enumerate(cut.sizes))))


@lru_cache(maxsize=4096)
def _overlaps(cut: _Cut, i: int, block: int | None, peers: tuple[tuple[int, ...], ...]) -> tuple[Box, ...]:
    return overlaps([touched(_box(cut, peer), cell(cut.shape, i, block)) for peer in peers])


# A mesh may have thousands of ranks, and a model hundreds of tensors on it: the ranks are written down once. Their
# process group is not, since a mesh of a later process group is equal. And the mesh is not held either: with it its
# groups, and their threads, would outlive `destroy_process_group()`.


def _once_per_mesh(function: Callable[Concatenate[DeviceMesh, P], T]) -> Callable[Concatenate[DeviceMesh, P], T]:
    known: WeakKeyDictionary[DeviceMesh, dict[tuple[Any, ...], T]] = WeakKeyDictionary()

    @wraps(function)
    def of(mesh: DeviceMesh, /, *args: P.args, **kwargs: P.kwargs) -> T:
        results, key = known.setdefault(mesh, {}), (*args, *kwargs.items())
        if key not in results:
            results[key] = function(mesh, *args, **kwargs)
        return results[key]

    return of


@_once_per_mesh
def _ranks(mesh: DeviceMesh) -> tuple[int, ...]:
    return tuple(mesh.mesh.flatten().tolist())


@_once_per_mesh
def _layout(mesh: DeviceMesh, placements: tuple[Placement, ...]) -> str:
    return f"{tuple(map(str, placements))} on a mesh of shape {tuple(mesh.shape)} of ranks {in_words(_ranks(mesh))}"


@_once_per_mesh
def _members(mesh: DeviceMesh, dims: tuple[int, ...], here: tuple[int, ...]) -> tuple[int, ...]:
    ranks = mesh.mesh[tuple(slice(None) if d in dims else here[d] for d in range(mesh.ndim))]
    return tuple(sorted(ranks.flatten().tolist()))


def _peers(mesh: DeviceMesh, dims: tuple[int, ...]) -> Peers:
    """The ranks that differ from this one in the coordinates ``dims`` of the mesh alone."""
    here = mesh.get_coordinate()
    assert here is not None
    members = _members(mesh, dims, tuple(here))
    if len(dims) == 1:
        return Peers(members, partial(mesh.get_group, dims[0]))
    return Peers(members, partial(group_of, members))
