"""DTensor parameters: FSDP2 (``fully_shard``), HSDP, tensor parallel and their combinations.

A mesh dimension that shards tensor dimension ``d`` cuts every row of the other dimensions, so accumulator ``i`` is a
maximum over all mesh dimensions that shard a dimension other than ``i``. Over the remaining ones it is already right:
it is itself a DTensor, sharded where the parameter is sharded along ``i`` and replicated elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from sm3_dist.box import Box
from sm3_dist.cover import touched
from sm3_dist.shard import LocalShard, Peers, Shared

Run = tuple[int, int]
"""Indices ``[start, stop)`` of one tensor dimension."""


def describe(param: Tensor, label: str) -> tuple[LocalShard, ...]:
    """One box: the product of the index ranges that the placements leave this rank."""
    assert isinstance(param, DTensor)
    mesh, placements = param.device_mesh, param.placements
    _refuse_unsupported(placements, label)
    shape = tuple(param.shape) or (1,)
    ranges = [_held(shape, dim, mesh, placements, label) for dim in range(len(shape))]
    box = Box(tuple(a for a, _ in ranges), tuple(b for _, b in ranges))
    if param.dim() and tuple(param.to_local().shape) != box.shape:
        raise ValueError(
            f"{label}: the local tensor has shape {tuple(param.to_local().shape)}, but placements {placements} on a "
            f"mesh of shape {tuple(mesh.shape)} give this rank {box.shape} of {shape}. Make the DTensor with the shape "
            "and stride of the whole tensor (DTensor.from_local(..., shape=, stride=))."
        )
    return (
        LocalShard(
            shape,
            boxes=(box,) if box.numel else (),
            extent=box,
            shared=tuple(_shared(box, i, mesh, placements) for i in range(len(shape))),
            ranks=tuple(mesh.mesh.flatten().tolist()),
            layout=f"{tuple(map(str, placements))} on mesh {mesh.mesh.tolist()}",
        ),
    )


def accumulator(param: DTensor, part: Tensor, i: int) -> DTensor:
    """Accumulator ``i`` of a DTensor parameter, as a DTensor of shape ``(n_i,)`` whose local part is ``part``."""
    placements = [_along(placement, i) for placement in param.placements]
    size = param.shape[i] if param.dim() else 1
    return DTensor.from_local(
        part, param.device_mesh, placements, run_check=False, shape=torch.Size([size]), stride=(1,)
    )


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


def _held(shape: Sequence[int], dim: int, mesh: DeviceMesh, placements: Sequence[Placement], label: str) -> Run:
    """The indices of one tensor dimension that this rank holds."""
    runs: list[Run] = [(0, shape[dim])]
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(
            f"{label}: this rank is not part of its mesh {mesh.mesh.tolist()}. Leave the parameter out here."
        )
    for mesh_dim, placement in enumerate(placements):
        if not _cuts(placement) or placement.dim != dim:  # type: ignore[attr-defined]
            continue
        # A strided shard was cut by a mesh dimension further right before: FSDP2 cuts what tensor parallel left.
        pieces = _split(runs, int(placement.split_factor)) if isinstance(placement, _StridedShard) else [runs]
        size, index = int(mesh.size(mesh_dim)), coordinate[mesh_dim]
        runs = _merged([run for piece in pieces for run in _split(piece, size)[index]])
    if len(runs) > 1:
        raise NotImplementedError(
            f"{label}: placements {tuple(placements)} give this rank the separate ranges {runs} of dimension {dim}. "
            "SM3 takes contiguous shards; redistribute the parameter to Shard placements."
        )
    return runs[0] if runs else (shape[dim], shape[dim])


def _split(runs: Sequence[Run], parts: int) -> list[list[Run]]:
    """Cut the indices into ``parts`` chunks of equal size but for the last ones, as ``torch.chunk`` does."""
    total = sum(b - a for a, b in runs)
    size = -(-total // parts)
    return [_take(runs, min(total, k * size), min(total, (k + 1) * size)) for k in range(parts)]


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


def _shared(box: Box, i: int, mesh: DeviceMesh, placements: Sequence[Placement]) -> Shared | None:
    """Accumulator ``i`` is a maximum over the mesh dimensions that shard another tensor dimension."""
    dims = tuple(
        mesh_dim
        for mesh_dim, placement in enumerate(placements)
        if _cuts(placement) and placement.dim != i and mesh.size(mesh_dim) > 1  # type: ignore[attr-defined]
    )
    return Shared(_peers(mesh, dims), (touched(box, i),)) if dims else None


def _peers(mesh: DeviceMesh, dims: tuple[int, ...]) -> Peers:
    """The ranks that differ from this one in the coordinates ``dims`` of the mesh alone."""
    here = mesh.get_coordinate()
    assert here is not None
    ranks = mesh.mesh[tuple(slice(None) if d in dims else here[d] for d in range(mesh.ndim))]
    members = tuple(sorted(ranks.flatten().tolist()))
    if len(dims) == 1:
        return Peers(members, partial(mesh.get_group, dims[0]))
    return Peers(members, partial(dist.new_group, members, use_local_synchronization=True))
