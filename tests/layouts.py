"""The table of DTensor layouts: each cuts the parameters of a module in its own way.

A layout takes a module of :class:`Tensors` and returns it wrapped. What a test gives and reads are whole tensors:
`give` puts a rank's part of a full gradient into place, `full` puts a parameter or a state tensor together again. Both
go through DTensor itself, not through the code under test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

# Odd and even, longer and shorter than any world, of every rank from 1 to 5, and with dimensions of size 1.
SHAPES = [(3, 5), (7,), (8, 4), (6, 4, 3), (1, 9), (9, 1), (2, 3, 2, 5), (4, 1, 2, 1, 3), (1,), (12, 6)]


class Tensors(nn.Module):
    """A module of bare parameters, in pairs within submodules so that wrappers can nest."""

    def __init__(self, shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
        self.blocks = nn.ModuleList(nn.ParameterList(weights[k : k + 2]) for k in range(0, len(weights), 2))

    def forward(self) -> Tensor:
        return torch.stack([weight.square().sum() for weight in self.parameters()]).sum()


@dataclass(frozen=True)
class Layout:
    """One row of the table.

    Attributes:
        worlds: the world sizes at which it makes sense.
        wrap: shards the module in place, or returns the wrapper.
        shapes: the shapes that it can take.
    """

    worlds: tuple[int, ...]
    wrap: Callable[[Tensors], nn.Module]
    shapes: Sequence[tuple[int, ...]] = tuple(SHAPES)


def _whole(module: Tensors) -> nn.Module:
    return module


def _ddp(module: Tensors) -> nn.Module:
    return DistributedDataParallel(module)


def _fsdp2(module: Tensors) -> nn.Module:
    return fully_shard(module)


def _fsdp2_nested(module: Tensors) -> nn.Module:
    for block in list(module.blocks)[1:]:
        fully_shard(block)
    return fully_shard(module)


def _fsdp2_last_dim(module: Tensors) -> nn.Module:
    """Sharded along the last dimension where FSDP2 can: it asks for even shards there."""

    def last(param: nn.Parameter) -> Shard:
        even = param.shape[-1] % dist.get_world_size() == 0
        return Shard(param.dim() - 1 if even else 0)

    return fully_shard(module, shard_placement_fn=last)


def _hsdp(replicas: int) -> Callable[[Tensors], nn.Module]:
    def wrap(module: Tensors) -> nn.Module:
        shards = dist.get_world_size() // replicas
        return fully_shard(
            module, mesh=init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replica", "shard"))
        )

    return wrap


def distribute(
    module: nn.Module, mesh: DeviceMesh, placements_of: Callable[[int, Tensor], Sequence[Placement]]
) -> None:
    """Make every parameter a DTensor, as ``parallelize_module`` does."""
    number = iter(range(1000))

    def partition(_: str, part: nn.Module, mesh: DeviceMesh) -> None:
        for key, param in list(part.named_parameters(recurse=False)):
            placements = placements_of(next(number), param)
            # distribute_tensor of PyTorch 2.9 cannot cut what leaves nothing to some ranks twice
            whole = DTensor.from_local(param.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
            local = whole.redistribute(placements=placements).to_local().clone(memory_format=torch.contiguous_format)
            shape = {"shape": param.shape, "stride": param.stride()}
            part.register_parameter(key, nn.Parameter(DTensor.from_local(local, mesh, placements, **shape)))

    distribute_module(module, mesh, partition)


def _tensor_parallel(module: Tensors) -> nn.Module:
    """Rows, columns and replicas in turn."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    distribute(module, mesh, lambda number, param: [in_turn(number, param)])
    return module


def in_turn(number: int, param: Tensor) -> Placement:
    return [Shard(0), Shard(param.dim() - 1), Replicate()][number % 3]


def _tensor_parallel_2d(module: Tensors) -> nn.Module:
    """Two mesh dimensions that cut different tensor dimensions, the same one, or one of the two nothing."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))

    def placements(number: int, param: Tensor) -> list[Placement]:
        last = Shard(param.dim() - 1)
        return [[Shard(0), last], [last, Shard(0)], [Shard(0), Shard(0)], [Replicate(), last]][number % 4]

    distribute(module, mesh, placements)
    return module


def _fsdp2_tensor_parallel(module: Tensors) -> nn.Module:
    """Tensor parallel first, what it leaves sharded by FSDP2: ``_StridedShard`` where both cut dimension 0."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    distribute(module, mesh["tp"], lambda number, param: [in_turn(number, param)])
    return fully_shard(module, mesh=mesh["dp"])


LAYOUTS = {
    "whole": Layout((1,), _whole),
    "ddp": Layout((1, 2, 3), _ddp),
    "fsdp2": Layout((1, 2, 3, 4), _fsdp2),
    "fsdp2-nested": Layout((2, 4), _fsdp2_nested),
    "fsdp2-last-dim": Layout((2, 3, 4), _fsdp2_last_dim),
    "hsdp": Layout((2, 4), _hsdp(2)),
    "hsdp-replicas-only": Layout((4,), _hsdp(4)),
    "tp": Layout((1, 2, 3, 4), _tensor_parallel),
    "tp-2d": Layout((2, 4), _tensor_parallel_2d),
    "fsdp2-tp": Layout((2, 4), _fsdp2_tensor_parallel),
}


def cases() -> Iterator[tuple[str, int]]:
    """Every layout at every of its world sizes."""
    for name, layout in LAYOUTS.items():
        for world_size in layout.worlds:
            yield name, world_size


def give(param: Tensor, grad: Tensor | None) -> None:
    """Make this rank's part of a full gradient the gradient of a parameter."""
    if grad is None:
        param.grad = None
    elif isinstance(param, DTensor):
        param.grad = sharded_like(param, grad)
    else:
        param.grad = grad.clone()


def sharded_like(like: DTensor, whole: Tensor) -> DTensor:
    """A tensor that every rank has, cut as another is; nothing is sent."""
    mesh, local = like.device_mesh, whole
    # What PyTorch calls strided is cut last: FSDP2 over tensor parallelism, whose mesh dimension comes behind it.
    cuts = [(mesh.get_local_rank(m), mesh.size(m), placement) for m, placement in enumerate(like.placements)]
    for rank, size, placement in sorted(cuts, key=lambda cut: isinstance(cut[2], _StridedShard)):
        if not placement.is_replicate():
            parts = local.chunk(size, placement.dim)
            local = parts[rank] if rank < len(parts) else local.narrow(placement.dim, 0, 0)
    shape = {"shape": whole.shape, "stride": whole.stride()}
    local = local.clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(local, mesh, like.placements, run_check=False, **shape)


def same(tensor: Tensor, whole: Tensor) -> bool:
    """Whether what this rank has of a parameter or of a state tensor is its part of the whole one, to the last bit."""
    if isinstance(tensor, DTensor):
        return tensor.shape == whole.shape and torch.equal(tensor.to_local(), sharded_like(tensor, whole).to_local())
    return torch.equal(tensor.detach(), whole)


def full(tensor: Tensor) -> Tensor:
    """The whole of a parameter or of a state tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
