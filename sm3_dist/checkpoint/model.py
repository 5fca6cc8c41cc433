"""The weights and buffers of models whose wrappers flattened parameters, by canonical name and without gathering any.

PyTorch's own functions put whole parameters together to make shards of them, and do not know fairscale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _IncompatibleKeys

from sm3_dist.checkpoint.names import canonical_modules
from sm3_dist.checkpoint.slots import Reader, Slot
from sm3_dist.layout.box import Box
from sm3_dist.layout.describe import Flattened, local_tensor
from sm3_dist.layout.flat_metadata import flat_tensors
from sm3_dist.layout.kinds import reshard
from sm3_dist.layout.shard import LocalShard


def is_flattened(model: nn.Module) -> bool:
    """Whether a wrapper in ``model`` flattened parameters, or has names that PyTorch's functions do not know."""
    foreign = any(type(module).__name__ == "ShardedDataParallel" for module in model.modules())
    return foreign or next(flat_tensors(model), None) is not None


def model_slots(model: nn.Module) -> dict[str, Slot]:
    """What this rank holds of each weight and each persistent buffer.

    Raises:
        NotImplementedError: if a module has extra state.
        RuntimeError: if a wrapper has gathered its parameters at present.
    """
    reshard(model)
    flattened = Flattened(model)
    flattened.check_sharded()
    aliases = {original.name: original.aliases for flat in flat_tensors(model) for original in flat.originals}
    slots: dict[str, Slot] = {}
    for prefix, module in canonical_modules(model):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise NotImplementedError(
                f"{prefix.rstrip('.') or 'the model'} has extra state, which is not saved together with flattened "
                "parameters. Save it on its own, or use torch.distributed.fsdp.fully_shard (FSDP2)."
            )
        for key, parameter in module.named_parameters(recurse=False):
            shards = flattened.describe(parameter, prefix + key, None)
            if shards is None:
                slots[prefix + key] = _unflattened(parameter.detach())
                continue
            for shard in shards:
                name = shard.name or prefix + key
                slot = _flattened(parameter.detach(), shard)
                slots |= dict.fromkeys((name, *aliases.get(name, ())), slot)
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                slots[prefix + key] = _unflattened(buffer)
    return slots


def load_model(
    model: nn.Module, shapes: Mapping[str, Any], loaded: Iterable[tuple[str, Tensor]], strict: bool
) -> _IncompatibleKeys:
    """Take over weights and buffers by name.

    Args:
        model: the wrapped root module.
        shapes: for each name something with the ``shape`` of the value.
        loaded: name and value, in the same order on every rank.
        strict: whether the names must be those of the model.

    Raises:
        RuntimeError: if names or shapes differ; nothing is then changed.
    """
    slots = model_slots(model)
    missing = [name for name in slots if name not in shapes]
    unexpected = [name for name in shapes if name not in slots]
    wrong = [
        f"{name} has shape {tuple(shapes[name].shape)} instead of {slot.shape}"
        for name, slot in slots.items()
        if name in shapes and tuple(shapes[name].shape) != slot.shape
    ]
    if wrong or (strict and (missing or unexpected)):
        problems = [f"missing: {', '.join(missing)}"] * bool(missing)
        problems += [f"unexpected: {', '.join(unexpected)}"] * bool(unexpected)
        raise RuntimeError(f"the loaded weights are those of another model: {'; '.join(problems + wrong)}")
    for name, value in loaded:
        slot = slots.get(name)
        reader = Reader(value, slot.tensor if slot else None)
        if slot:
            for box, part in zip(slot.boxes, slot.parts, strict=True):
                part.copy_(reader.read(box))
    return _IncompatibleKeys(missing, unexpected)


def _flattened(parameter: Tensor, shard: LocalShard) -> Slot:
    shape = shard.shape
    parts = shard.views(local_tensor(parameter))
    return Slot(shape, list(shard.boxes), parts, parameter, whole=False, ranks=shard.ranks)


def _unflattened(tensor: Tensor) -> Slot:
    local = local_tensor(tensor) if isinstance(tensor, DTensor) else tensor
    boxes, parts = ([Box.whole(local.shape)], [local]) if local.numel() else ([], [])
    return Slot(tuple(tensor.shape), boxes, parts, tensor, whole=True)
