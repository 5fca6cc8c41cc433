"""The table of layouts that checkpoints move between, and what runs on the workers to move them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from launch.job import fairscale_cpu
from sm3_dist import SM3
from sm3_dist.checkpoint import TrainState, get_optimizer_state_dict, load
from sm3_dist.checkpoint.canonical import Canonical
from sm3_dist.layout.box import Box
from sm3_dist.layout.describe import local_tensor
from sm3_dist.step.entry import Entry
from sm3_dist.step.param_groups import ADAMW_LIKE

SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "beta": 0.9, "weight_decay": 0.01}
RECIPE = SETTINGS | ADAMW_LIKE | {"cover_block": 4}  # edges of shards cut blocks
STEPS = 2


class Net(nn.Module):
    """Tensors of one to four dimensions; no size is a multiple of 4."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = nn.Embedding(7, 6)
        self.block: nn.Module = nn.Sequential(nn.Linear(6, 5))
        self.conv = nn.Conv2d(3, 2, 3, bias=False)


class Wrapped(NamedTuple):
    """A model in some layout, and its optimizer."""

    model: nn.Module
    optimizer: Any
    """SM3, or fairscale's OSS with SM3 in it."""

    @property
    def entries(self) -> dict[str, Entry]:
        """What this rank holds of each tensor, by canonical name."""
        return Canonical(self.model, self.optimizer).entries


def zero(world: int) -> Wrapped:
    model = Net()
    return Wrapped(model, SM3(model.parameters(), **SETTINGS, shard_over=dist.group.WORLD))


def single(world: int) -> Wrapped:
    model = Net()
    return Wrapped(model, SM3(model.parameters(), **SETTINGS))


def ddp(world: int) -> Wrapped:
    model = DistributedDataParallel(Net())
    return Wrapped(model, SM3(model.parameters(), **SETTINGS))


def fsdp2(world: int) -> Wrapped:
    return shard(Net(), init_device_mesh("cpu", (world,)))


def hsdp(world: int) -> Wrapped:
    copies = 2 if world == 4 else world
    return shard(Net(), init_device_mesh("cpu", (copies, world // copies), mesh_dim_names=("replicate", "shard")))


def fsdp1(world: int) -> Wrapped:
    return flattened(use_orig_params=True)


def fsdp1_flat(world: int) -> Wrapped:
    return flattened(use_orig_params=False)


def flattened(use_orig_params: bool) -> Wrapped:
    options: dict[str, Any] = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
    net = Net()
    net.block = FullyShardedDataParallel(net.block, **options)
    model = FullyShardedDataParallel(net, **options)
    return Wrapped(model, SM3(model.parameters(), **SETTINGS, model=model))


def fairscale(world: int) -> Wrapped:
    from fairscale.nn.data_parallel import FullyShardedDataParallel as Wrapper

    fairscale_cpu.install()
    options = {"process_group": dist.group.WORLD, "process_group_reduce_scatter": dist.group.WORLD}
    options |= fairscale_cpu.ARGUMENTS
    net = Net()
    net.block = Wrapper(net.block, **options)
    model = Wrapper(net, **options)
    return Wrapped(model, SM3(model.parameters(), **SETTINGS, model=model))


def oss(world: int) -> Wrapped:
    from fairscale.optim import OSS

    model = Net()
    return Wrapped(model, OSS(model.parameters(), optim=SM3, **SETTINGS))


def tp_fsdp2(world: int) -> Wrapped:
    size = 2 if world == 4 else world
    mesh = init_device_mesh("cpu", (world // size, size), mesh_dim_names=("data", "tensor"))
    model = Net()
    for module in model.modules():
        placement = {nn.Embedding: Shard(0), nn.Linear: Shard(1), nn.Conv2d: Replicate()}.get(type(module))
        if placement is not None:
            for name, param in list(module.named_parameters(recurse=False)):
                cut = placement if param.dim() > 1 else Replicate()
                module.register_parameter(name, nn.Parameter(distribute_tensor(param.data, mesh["tensor"], [cut])))
    return shard(model, mesh["data"])


def shard(model: Net, mesh: Any) -> Wrapped:
    fully_shard(model.block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return Wrapped(model, SM3(model.parameters(), **SETTINGS))


LAYOUTS: dict[str, Callable[[int], Wrapped]] = {
    "ddp": ddp,
    "zero": zero,
    "fsdp2": fsdp2,
    "hsdp": hsdp,
    "tp_fsdp2": tp_fsdp2,
    "fsdp1": fsdp1,
    "fsdp1_flat": fsdp1_flat,
    "fairscale": fairscale,
    "oss": oss,
}
WORLDS = (1, 2, 3, 4)
PLACES = [("single", 1), *((name, world) for name in LAYOUTS for world in WORLDS)]


def names(world: int) -> list[str]:
    return [name for name, size in PLACES if size == world]


def build(name: str, world: int) -> Wrapped:
    return single(world) if name == "single" else LAYOUTS[name](world)


def trained() -> Wrapped:
    wrapped = single(1)
    train(wrapped, range(STEPS))
    return wrapped


def fresh() -> TrainState:
    return TrainState(*single(1))


@functools.cache
def gradients(step: int) -> dict[str, Tensor]:
    """The same for every layout."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(param.shape, generator=generator) for name, param in Net().named_parameters()}


def inject(entries: dict[str, Entry], step: int) -> None:
    """Give every parameter its part of the step's gradients."""
    for name, grad in gradients(step).items():
        if name not in entries:  # of another rank
            continue
        param, part = entries[name].param, entries[name].shard
        if isinstance(param, DTensor):
            local = grad[at(part.extent)].contiguous()
            param.grad = DTensor.from_local(
                local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
            )
        elif part.flat_start is None:
            param.grad = grad.clone()
        else:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            for view, box in zip(part.views(param.grad), part.boxes, strict=True):
                view.copy_(grad[at(box)])


def at(box: Box) -> tuple[slice, ...]:
    return tuple(map(slice, box.start, box.stop))


def train(wrapped: Wrapped, steps: range) -> None:
    entries = wrapped.entries
    for step in steps:
        inject(entries, step)
        wrapped.optimizer.step()
    wrapped.optimizer.zero_grad()


class Expected(NamedTuple):
    """What one process has, by canonical name."""

    weights: dict[str, Tensor]
    state: dict[str, dict[str, Tensor]]


def expected(steps: int) -> Expected:
    """The state of one process after so many steps, without any checkpoint."""
    return _expected(steps, frozenset(SETTINGS.items()))


@functools.cache
def _expected(steps: int, settings: frozenset[tuple[str, Any]]) -> Expected:
    model, optimizer = wrapped = single(1)
    train(wrapped, range(steps))
    state = get_optimizer_state_dict(model, optimizer)["state"]
    return Expected({name: param.detach() for name, param in model.named_parameters()}, state)


def differences(wrapped: Wrapped, wanted: Expected) -> list[str]:
    """Names of the values of which this rank holds something else than one process; of absent ones too."""
    canonical = Canonical(*wrapped)
    found = [] if canonical.apart else [name for name in wanted.weights if name not in canonical.entries]
    if canonical.apart:
        named = dict(wrapped.model.named_parameters())
        found += [f"{name}: weight" for name, weight in wanted.weights.items() if not torch.equal(named[name], weight)]
    for name, entry in canonical.entries.items():
        if not all(torch.equal(part, wanted.weights[name][at(box)]) for box, part in weights(entry)):
            found.append(f"{name}: weight")
        slots = canonical.slots(entry)
        if slots.keys() != wanted.state[name].keys():
            found.append(f"{name}: {list(slots)}")
            continue
        for key, slot in slots.items():
            value = wanted.state[name][key]
            if key in ("step", "update_square_average") and not entry.shard.numel:
                continue  # a rank without elements may have no gradient, and hears of nobody's squares
            same = (torch.equal(part, value[at(box)]) for box, part in zip(slot.boxes, slot.parts, strict=True))
            if not all(same) or slot.shape != value.shape:
                found.append(f"{name}: {key}")
    return found


def weights(entry: Entry) -> list[tuple[Box, Tensor]]:
    """What this rank has of a tensor, box by box."""
    local = local_tensor(entry.param.detach())
    if entry.shard.replicated:
        return [(Box.whole(entry.shard.shape), local)]
    return list(zip(entry.shard.boxes, entry.shard.views(local), strict=True))


def spoil(wrapped: Wrapped, weights_too: bool = True) -> None:
    """Overwrite weights and state, so that whatever is not loaded shows."""
    canonical = Canonical(*wrapped)
    for entry in canonical.entries.values():
        for _, part in weights(entry) if weights_too else []:
            part.fill_(-5)
        canonical.optimizer._keeper.states[entry.param]["step"].fill_(-5)
        for slot in canonical.slots(entry).values():
            for part in slot.parts:
                part.fill_(-5)


def with_recipe(what: Callable[..., list[str]], *arguments: Any) -> list[str]:
    """What a function finds where SM3 is used as ``SM3.adamw_like`` does."""
    return with_settings(RECIPE, what, *arguments)


def with_settings(settings: dict[str, Any], what: Callable[..., list[str]], *arguments: Any) -> list[str]:
    """What a function finds with other arguments for SM3."""
    usual = dict(SETTINGS)
    try:
        SETTINGS.update(settings)
        return what(*arguments)
    finally:
        SETTINGS.clear()
        SETTINGS.update(usual)


def save_all(folder: Path, world: int, some: Sequence[str] | None = None) -> list[str]:
    """Train in every layout of this world size (or some) and save. What differs from one process."""
    found = []
    wanted = expected(STEPS)
    for name in some or names(world):
        wrapped = build(name, world)
        train(wrapped, range(STEPS))
        found += [f"{name}: {what}" for what in differences(wrapped, wanted)]
        writer = FileSystemWriter(folder / f"{name}-{world}", sync_files=False)  # nobody pulls the plug here
        save({"train": TrainState(*wrapped, step=STEPS)}, storage_writer=writer)
    return found


@torch.no_grad()
def load_all(folder: Path, world: int, name: str, some: Sequence[str] | None = None) -> list[str]:
    """Load every checkpoint (or some) into one layout, compare, train on, compare. What differs."""
    found = []
    before, after = expected(STEPS), expected(2 * STEPS)
    wrapped = build(name, world)
    state = TrainState(*wrapped)
    for source in some or sorted(path.name for path in folder.iterdir()):
        spoil(wrapped)
        load({"train": state}, folder / source)
        found += [f"{source} as loaded: {what}" for what in differences(wrapped, before)]
        train(wrapped, range(state.step, state.step + STEPS))
        found += [f"{source} two steps later: {what}" for what in differences(wrapped, after)]
    return found


def written_once(folder: Path) -> list[str]:
    """What of the metadata of a checkpoint writes an element not once."""
    metadata = FileSystemReader(folder).read_metadata()
    found = []
    for name, value in metadata.state_dict_metadata.items():
        if not isinstance(value, TensorStorageMetadata):
            continue
        count = torch.zeros(value.size, dtype=torch.int)
        for chunk in value.chunks:
            count[tuple(slice(a, a + n) for a, n in zip(chunk.offsets, chunk.sizes, strict=True))] += 1
        if not bool((count == 1).all()):
            found.append(name)
    return found
