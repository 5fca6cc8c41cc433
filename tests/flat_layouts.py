"""The table of flat layouts: wrappers that flatten parameters and cut them anywhere.

Gradients reach the parameters through a real backward pass of the real wrapper: the loss is the sum of the products of
each weight with the gradient that it is to get, which every rank computes alike. The wrapper sums `W` equal gradients
and divides by `W`. The gradients have few significant bits, so that this is exact and the gradient is what was asked
for, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel, MixedPrecision, ShardingStrategy

from launch.job import fairscale_cpu

Shape = tuple[int, ...]
# Ranks 0 to 4 of every kind: cut in mid-row, rows and whole tensors shorter than a part, dimensions of size 1.
BLOCKS: tuple[tuple[Shape, ...], ...] = (
    ((3, 5), (7,), (8, 4)),
    ((6, 4, 3), (1, 9)),
    ((2, 3, 2, 5), (9, 1), (1,)),
)
ONE_ROW: tuple[tuple[Shape, ...], ...] = (((1, 29),),)
FEW: tuple[tuple[Shape, ...], ...] = (((5,),), ((1, 2), (2, 1)))


class Block(nn.Module):
    """Some weights; its loss has the given gradients."""

    def __init__(self, shapes: tuple[Shape, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)

    def forward(self, grads: Mapping[str, Tensor]) -> Tensor:
        terms = [(self.weights[int(k)] * grad).sum() for k, grad in grads.items()]
        return torch.stack(terms).sum() if terms else torch.zeros(())


class Model(nn.Module):
    """Several blocks and a weight of their own."""

    def __init__(self, blocks: tuple[tuple[Shape, ...], ...] = BLOCKS, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(Block(shapes, generator) for shapes in blocks)
        self.root = nn.Parameter(torch.randn(4, 6, generator=generator))
        self.to(dtype)

    def forward(self, grads: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros(())
        if "root" in grads:
            total = total + (self.root * grads["root"]).sum()
        for b, block in enumerate(self.blocks):
            prefix = f"blocks.{b}.weights."
            inner = {name.removeprefix(prefix): grad for name, grad in grads.items() if name.startswith(prefix)}
            if inner:
                total = total + block(inner)
        return total


def exact_gradient(step: int, name: str, shape: torch.Size | Shape) -> Tensor:
    """A full gradient whose values have at most 5 significant bits."""
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    mantissa = torch.randint(-31, 32, tuple(shape), generator=generator).float()
    exponent = torch.randint(-6, 3, tuple(shape), generator=generator).float()
    return mantissa * 2**exponent


@dataclass(frozen=True)
class FlatLayout:
    """One row of the table.

    Attributes:
        worlds: the world sizes at which it makes sense.
        wrap: wraps a model.
        gather: the weights by name, put together by the wrapper itself, on every rank.
        unit: which tensors are flattened together: the same string for all of them. If one has a gradient, all have.
        blocks: the shapes.
        complete: whether every tensor must have a gradient in every step. Without one fairscale fails in nested
            wrappers and in those that do not flatten, and torch gives zeros (NO_SHARD) or that of the step before
            (CPUOffload) instead of none.
        set_to_none: how to zero gradients. With CPUOffload on the CPU and use_orig_params, torch adds to the old ones
            unless they are zeroed in place.
    """

    worlds: tuple[int, ...]
    wrap: Callable[[Model], nn.Module]
    gather: Callable[[nn.Module], dict[str, Tensor]]
    unit: Callable[[str], str]
    blocks: tuple[tuple[Shape, ...], ...] = BLOCKS
    complete: bool = False
    set_to_none: bool = True


# ------------------------------------------------------------------------------------------------------ torch's FSDP1


def fsdp1(module: nn.Module, **arguments: Any) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **arguments)


def gather_fsdp1(model: nn.Module) -> dict[str, Tensor]:
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {clean(name): weight.detach().clone() for name, weight in model.named_parameters()}


def clean(name: str) -> str:
    wrappers = ("_fsdp_wrapped_module.", "_fpw_module.", "module.")
    for wrapper in wrappers:
        name = name.replace(wrapper, "")
    return name


def hybrid() -> dict[str, Any]:
    """Two replicas, each sharded over half of the ranks."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replica", "shard"))
    return {"device_mesh": mesh, "sharding_strategy": ShardingStrategy.HYBRID_SHARD}


def offload() -> dict[str, Any]:
    """Parameters on the CPU. Without an accelerator they are there already: nothing to be pinned or waited for."""
    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign,assignment]
        torch.cpu.Stream.synchronize = lambda self: None  # type: ignore[attr-defined]
    return {"cpu_offload": CPUOffload(offload_params=True)}


def wrap_fsdp1(
    nested: bool, separate: bool, arguments: Mapping[str, Any] | Callable[[], Mapping[str, Any]]
) -> Callable[[Model], nn.Module]:
    def wrap(model: Model) -> nn.Module:
        given = dict(arguments() if callable(arguments) else arguments)
        policy = (lambda module, recurse, **_: recurse or isinstance(module, Block)) if nested else None
        return fsdp1(model, use_orig_params=separate, auto_wrap_policy=policy, **given)

    return wrap


def in_one(name: str) -> str:
    return "model"


def by_block(name: str) -> str:
    return name.rpartition(".weights.")[0]


def by_tensor(name: str) -> str:
    return name


FSDP1: dict[str, tuple[tuple[int, ...], bool, Mapping[str, Any] | Callable[[], Mapping[str, Any]]]] = {
    # name: world sizes, nested, arguments
    "full-shard": ((1, 2, 3, 4), False, {}),
    "nested": ((2, 3, 4), True, {}),
    "shard-grad-op": ((3,), True, {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP}),
    "no-shard": ((2,), True, {"sharding_strategy": ShardingStrategy.NO_SHARD}),
    "hybrid-shard": ((4,), True, hybrid),
    "cpu-offload": ((2,), True, offload),
    "mixed-precision": (
        (2,),
        True,
        {"mixed_precision": MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    ),
    "low-precision-gradients": (
        (2,),
        False,
        {"mixed_precision": MixedPrecision(param_dtype=torch.bfloat16, keep_low_precision_grads=True)},
    ),
}


# --------------------------------------------------------------------------------------------------- fairscale's FSDP


def wrap_fairscale(nested: bool, **arguments: Any) -> Callable[[Model], nn.Module]:
    def wrap(model: Model) -> nn.Module:
        from fairscale.nn.data_parallel import FullyShardedDataParallel as Wrapper

        fairscale_cpu.install()
        given = {"process_group": dist.group.WORLD, "process_group_reduce_scatter": dist.group.WORLD}
        given |= fairscale_cpu.ARGUMENTS | arguments
        if nested:
            for b, block in enumerate(model.blocks):
                model.blocks[b] = Wrapper(block, **given)
        return Wrapper(model, **given)

    return wrap


def gather_fairscale(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------- the table


def _table() -> dict[str, FlatLayout]:
    table: dict[str, FlatLayout] = {}
    for name, (worlds, nested, arguments) in FSDP1.items():
        unit = by_block if nested else in_one
        for separate in (True, False):
            key = f"fsdp1-{name}" if separate else f"fsdp1-flat-{name}"
            table[key] = FlatLayout(
                worlds,
                wrap_fsdp1(nested, separate, arguments),
                gather_fsdp1,
                unit,
                complete=name in ("no-shard", "cpu-offload"),
                set_to_none=name != "cpu-offload",
            )
    for separate in (True, False):
        key = "fsdp1" if separate else "fsdp1-flat"
        wrap = wrap_fsdp1(True, separate, {})
        table[f"{key}-row-over-all"] = FlatLayout((3, 4), wrap, gather_fsdp1, by_block, ONE_ROW)
        table[f"{key}-only-padding"] = FlatLayout((4,), wrap, gather_fsdp1, by_block, FEW)
    for flatten in (True, False):
        key = "fairscale" if flatten else "fairscale-separate"
        unit = by_block if flatten else by_tensor
        for worlds, nested, reshard in (((1, 2, 4), True, True), ((3,), True, False), ((3,), False, True)):
            name = f"{key}-{'nested' if nested else 'root'}{'' if reshard else '-no-reshard'}"
            table[name] = FlatLayout(
                worlds,
                wrap_fairscale(nested, flatten_parameters=flatten, reshard_after_forward=reshard),
                gather_fairscale,
                unit if nested or not flatten else in_one,
                complete=nested or not flatten,
            )
    return table


LAYOUTS = _table()


def cases() -> Iterator[tuple[str, int]]:
    """Every layout at every of its world sizes."""
    for name, layout in LAYOUTS.items():
        for world_size in layout.worlds:
            yield name, world_size
