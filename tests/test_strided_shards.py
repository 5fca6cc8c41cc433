"""What tensor parallelism and FSDP2 cut along one dimension, in every release of PyTorch: right, or an error."""

from __future__ import annotations

import torch
from harness import Pool
from layouts import Tensors, distribute, same
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from sm3_dist import SM3

SHAPES = [(rows, 3) for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 70)]
GRADIENTS: list[tuple[Placement, Placement]] = [
    (Replicate(), Replicate()),
    (Partial(), Replicate()),
    (Partial(), Shard(0)),
    (Partial(), Partial()),
    (Shard(0), Shard(0)),
]


def both_ways() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def cut_twice(mesh: DeviceMesh) -> Tensors:
    """A module with weights that are cut twice along their rows."""
    model = Tensors(SHAPES)
    distribute(model, mesh["tp"], lambda number, param: [Shard(0)])
    fully_shard(model, mesh=mesh["dp"])
    assert all(isinstance(weight.placements[0], _StridedShard) for weight in model.parameters())
    return model


def gradient(like: DTensor, whole: Tensor, placements: tuple[Placement, Placement]) -> DTensor:
    """A gradient that is cut otherwise than its parameter, or is a sum over ranks (of equal parts, and so exact)."""
    mesh, local = like.device_mesh, whole
    for dim, placement in enumerate(placements):
        if isinstance(placement, Partial):
            local = local / 2
        elif isinstance(placement, Shard):
            parts, rank = local.chunk(2), mesh.get_local_rank(dim)
            local = parts[rank] if rank < len(parts) else local[:0]
    shape = {"shape": whole.shape, "stride": whole.stride()}
    return DTensor.from_local(local.clone(), mesh, placements, run_check=False, **shape)


def steps_differ(skip_nonfinite: str | None) -> list[str]:
    found, mesh = [], both_ways()
    for placements in GRADIENTS:
        model, whole = cut_twice(mesh), Tensors(SHAPES)
        pairs = list(zip(model.parameters(), whole.parameters(), strict=True))
        generator = torch.Generator().manual_seed(0)
        for weight, wanted in pairs:
            wanted.grad = torch.randn(wanted.shape, generator=generator)
            weight.grad = gradient(weight, wanted.grad, placements)
        for optimizer in (SM3(each.parameters(), skip_nonfinite=skip_nonfinite) for each in (model, whole)):
            optimizer.step()
        found += [f"{tuple(w.shape)} with {placements}" for weight, w in pairs if not same(weight, w.detach())]
    return found


def test_steps_take_gradients_that_are_cut_otherwise(workers: Pool) -> None:
    for skip_nonfinite in (None, "parameter"):  # which looks at gradients first
        assert workers(4).run(steps_differ, skip_nonfinite) == [[]] * 4


def wrong_in_silence() -> list[str]:
    model, found = cut_twice(both_ways()), []
    SM3(model.parameters())
    for weight, tensor in zip(model.parameters(), Tensors(SHAPES).parameters(), strict=True):
        whole = tensor.detach()
        try:
            if not torch.equal(weight.full_tensor(), whole):
                found.append(f"{tuple(whole.shape)} put together")
        except NotImplementedError as error:
            found += [] if str(error).startswith("PyTorch 2.9") else [str(error)]
        try:
            if not same(distribute_tensor(whole, weight.device_mesh, weight.placements), whole):
                found.append(f"{tuple(whole.shape)} cut")
        except (AssertionError, NotImplementedError) as error:  # from 2.10 on, an assertion of PyTorch itself
            found += [] if len(whole) % 4 else [str(error)]
        try:
            total = gradient(weight, whole, (Partial(), Shard(0))).redistribute(placements=weight.placements)
            if not same(total, whole):
                found.append(f"{tuple(whole.shape)} added up")
        except NotImplementedError as error:
            found += [] if str(error).startswith("PyTorch 2.9") else [str(error)]
    return found


def test_what_pytorch_cannot_do_is_refused(workers: Pool) -> None:
    assert workers(4).run(wrong_in_silence) == [[]] * 4
