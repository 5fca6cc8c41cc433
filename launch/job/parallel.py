"""Parallelism: how the ranks share a model. Each strategy is a function; :data:`PARALLEL` names them all."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from launch.job import fairscale_cpu, packages
from launch.job.batches import Share
from launch.job.model import GPT, Block
from launch.job.options import Options
from launch.job.world import UserError, World


class Parallel(NamedTuple):
    """A model that the ranks share.

    Attributes:
        model: what to call and to train.
        share: the part of every batch that this rank computes.
        shard_over: the ranks that are to share the optimizer's state, where the model itself does not say it.
        oss: whether fairscale's OSS is to give each rank the state of some of the parameters.
    """

    model: nn.Module
    share: Share
    shard_over: ProcessGroup | None = None
    oss: bool = False


def parallelize(model: GPT, world: World, device: torch.device, options: Options) -> Parallel:
    """Wrap ``model``, which is on the meta device, as ``--parallel`` says, and give it its first weights.

    What a wrapper cuts up is cut before it takes memory: no rank ever holds more of the model than its part.

    Raises:
        UserError: the strategy does not suit this number of ranks or this model.
    """
    return PARALLEL[strategy(options, world)](model, world, device.type, options)


def strategy(options: Options, world: World) -> str:
    """Return the name of the strategy: ``--parallel``, or what "auto" stands for."""
    if options.parallel != "auto":
        return options.parallel
    return "fsdp2" if world.size > 1 else "none"


# Strategies that give a model its weights before they cut it up.
WRAPPED_WHOLE = ("fsdp1", "fsdp1-flat", "fairscale")
# Strategies under which the optimizer sees one parameter in the place of all those of a block.
FLATTENED = ("fsdp1-flat", "fairscale")


def ranks_per_copy(options: Options, world: World) -> int:
    """Over how many ranks one copy of the weights is spread."""
    name = strategy(options, world)
    if name in ("none", "ddp", "zero1", "oss"):
        return 1
    return max(1, world.size // options.replicas) if name == "hsdp" else world.size


def none(model: GPT, world: World, device: str, options: Options) -> Parallel:
    """One process, no wrapper."""
    if world.size > 1:
        raise UserError(f"--parallel none is for one process, and there are {world.size}; pass ddp or fsdp2")
    return Parallel(model.materialize(device), Share())


def ddp(model: GPT, world: World, device: str, options: Options) -> Parallel:
    """Every rank has the whole model; gradients are averaged."""
    return Parallel(DistributedDataParallel(model.materialize(device)), Share(world.rank, world.size))


def zero1(model: GPT, world: World, device: str, options: Options) -> Parallel:
    """Like ddp, but each rank has the optimizer state of a part of the parameters, and updates that part."""
    return ddp(model, world, device, options)._replace(shard_over=dist.group.WORLD)


def fsdp2(model: GPT, world: World, device: str, options: Options) -> Parallel:
    """Every rank has a slice of each parameter and gathers the rest, block by block, when it is needed."""
    mesh = init_device_mesh(device, (world.size,), mesh_dim_names=("shard",))
    return Parallel(shard(model, mesh, options).materialize(device), Share(world.rank, world.size))


def hsdp(model: GPT, world: World, device: str, options: Options) -> Parallel:
    """Several copies of the model, each sharded over some of the ranks."""
    copies = options.replicas
    if world.size % copies:
        raise UserError(
            f"--parallel hsdp makes --replicas {copies} equal groups of the ranks, and {world.size} is not a multiple "
            f"of {copies}; choose a divisor of {world.size}, or pass fsdp2"
        )
    mesh = init_device_mesh(device, (copies, world.size // copies), mesh_dim_names=("replicate", "shard"))
    return Parallel(shard(model, mesh, options).materialize(device), Share(world.rank, world.size))


def tp(model: GPT, world: World, device: str, options: Options) -> Parallel:
    """Ranks share each layer: attention by heads, perceptrons by their inner channels, the embedding by its rows.

    With more ranks than ``--tp-size``, groups of that size share the batch, and FSDP2 shards over them.
    """
    size = options.tp_size or world.size
    heads = model.shape.heads
    if world.size % size:
        raise UserError(f"--tp-size {size} does not divide the {world.size} ranks")
    if heads % size:
        raise UserError(
            f"--parallel tp splits attention by heads, and {heads} heads (--model {options.model}) cannot be split "
            f"evenly over --tp-size {size}; choose a divisor of {heads}"
        )
    mesh = init_device_mesh(device, (world.size // size, size), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], tensor_plan())
    model.tie()
    groups = world.size // size
    if groups > 1:
        # True of the logits, which nobody writes to.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        shard(model, mesh["data"], options)
    return Parallel(model.materialize(device), Share(world.rank // size, groups))


def fsdp1(model: GPT, world: World, device: str, options: Options) -> Parallel:
    """FullyShardedDataParallel: the parameters of a block are laid out flat and cut into equal parts."""
    return Parallel(flatten(model, device, options, use_orig_params=True), Share(world.rank, world.size))


def fsdp1_flat(model: GPT, world: World, device: str, options: Options) -> Parallel:
    """Like fsdp1, but the optimizer sees one flat parameter for each block."""
    return Parallel(flatten(model, device, options, use_orig_params=False), Share(world.rank, world.size))


def flatten(model: GPT, device: str, options: Options, use_orig_params: bool) -> nn.Module:
    """Apply FSDP1 to each block and to what is left."""
    strategy = ShardingStrategy.FULL_SHARD if options.reshard else ShardingStrategy.SHARD_GRAD_OP
    return FullyShardedDataParallel(
        model.materialize(device),
        sharding_strategy=strategy,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        device_id=torch.device(device) if device == "cpu" else torch.cuda.current_device(),
        use_orig_params=use_orig_params,
    )


def fairscale(model: GPT, world: World, device: str, options: Options) -> Parallel:
    """fairscale's FullyShardedDataParallel, after which torch's was made."""
    wrapper = packages.load("fairscale.nn.data_parallel").FullyShardedDataParallel
    everyone = dist.group.WORLD  # by default fairscale keeps groups of its own for the life of the process
    arguments: dict[str, Any] = {"process_group": everyone, "process_group_reduce_scatter": everyone}
    arguments |= {"reshard_after_forward": options.reshard}
    if device == "cpu":
        fairscale_cpu.install()
        arguments |= fairscale_cpu.ARGUMENTS
    model.materialize(device)
    for k, block in enumerate(model.blocks):
        model.blocks[k] = wrapper(block, **arguments)
    return Parallel(wrapper(model, **arguments), Share(world.rank, world.size))


def oss(model: GPT, world: World, device: str, options: Options) -> Parallel:
    """fairscale's OSS: every rank has the whole model, and the optimizer state of some of its tensors."""
    packages.load("fairscale.optim")
    return Parallel(model.materialize(device), Share(world.rank, world.size), oss=True)


def reduce_gradients(model: nn.Module, optimizer: Optimizer) -> nn.Module:
    """Wrap a model whose gradients go to the ranks to which OSS gave the parameters; others are wrapped already."""
    if type(optimizer).__name__ != "OSS":
        return model
    # Its buffers would lose the gradients that zero_grad() sets to None.
    wrapper = packages.load("fairscale.nn.data_parallel").ShardedDataParallel
    wrapped: nn.Module = wrapper(model, optimizer, reduce_buffer_size=0)
    return wrapped


def clip(model: nn.Module, optimizer: Optimizer, limit: float) -> None:
    """Scale the gradient down to a norm of ``limit``. Who cut the gradient up knows the norm of the whole."""
    if hasattr(model, "clip_grad_norm_"):  # FullyShardedDataParallel, torch's and fairscale's
        model.clip_grad_norm_(limit)  # type: ignore[operator]
    elif hasattr(optimizer, "clip_grad_norm"):  # OSS
        optimizer.clip_grad_norm(limit)
    else:
        clip_grad_norm_(model.parameters(), limit)


# One entry for each choice of --parallel.
PARALLEL: dict[str, Callable[[GPT, World, str, Options], Parallel]] = {
    "none": none,
    "ddp": ddp,
    "zero1": zero1,
    "fsdp1": fsdp1,
    "fsdp1-flat": fsdp1_flat,
    "fairscale": fairscale,
    "oss": oss,
    "fsdp2": fsdp2,
    "hsdp": hsdp,
    "tp": tp,
}


def shard(model: GPT, mesh: DeviceMesh, options: Options) -> GPT:
    """Apply FSDP2 to each block, then to what is left: embeddings, last norm and head, which share a weight."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=options.reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=options.reshard)
    return model


def tensor_plan() -> dict[str, ParallelStyle]:
    """Say how each layer is cut. Between layers every rank of a group has the whole stream."""
    into, out_of = ColwiseParallel, RowwiseParallel
    return {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "position": Replicated(),
        "blocks.*.norm_attention": Replicated(),
        "blocks.*.attention.query": into(),
        "blocks.*.attention.key": into(),
        "blocks.*.attention.value": into(),
        "blocks.*.attention.out": out_of(),
        "blocks.*.norm_mlp": Replicated(),
        "blocks.*.mlp.up": into(),
        "blocks.*.mlp.down": out_of(),
        "norm": Replicated(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }


class Replicated(ParallelStyle):
    """The same on every rank of the group: parameters become replicated DTensors, like those beside them."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
            return tuple(DTensor.from_local(each, mesh, [Replicate()], run_check=False) for each in inputs)

        def leave(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
            return output.to_local()

        return distribute_module(module, device_mesh, None, enter, leave)  # type: ignore[arg-type]
