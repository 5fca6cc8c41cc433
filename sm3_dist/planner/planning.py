"""What a model will need per rank, before anything is rented: reckoned from shapes, to the byte."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor, nn

from sm3_dist.layout.shard import accumulator_dtype
from sm3_dist.planner.exchange_buffers import exchange_bytes
from sm3_dist.planner.rank_shards import REPLICATED, WRAPPERS, Pieces, rank_shards
from sm3_dist.ranks.fingerprint import FIELDS

IN_BACKWARD = ("none", "fsdp2", "hsdp", "tp")
"""Wrappers with which steps may be taken during backward."""

_STEP, _SQUARE_SUM = 4, 8


@dataclass(frozen=True)
class RankBytes:
    """Bytes on one rank between two steps.

    Attributes:
        weights: what the rank holds of the weights.
        gradients: as much of the gradients, once backward is through. With ``step_in_backward`` those that are there
            at a time: of the largest unit under FSDP2, of the largest parameter otherwise.
        state: of SM3: accumulators, momentum, step counts, and what ``update_rms`` keeps.
        sent: the buffers of maxima that are sent in each step, with what tells a rank apart that differs.
        adam_moments: the two moments that Adam would hold in place of ``state``, in the type of the weights.
        exchanged: with ``orthogonalize`` the buffers in which updates travel, within a step alone; the owner of a
            matrix takes about 10 bytes for each of its elements besides, for one matrix at a time.
    """

    weights: int
    gradients: int
    state: int
    sent: int
    adam_moments: int
    exchanged: int = 0


def plan(
    module: nn.Module,
    *,
    world: int = 1,
    wrapper: str = "none",
    replicas: int = 2,
    units: Collection[nn.Module] = (),
    tensor_parallel: Mapping[str, int] | None = None,
    shard_covers: bool = False,
    step_in_backward: bool = False,
    momentum: float = 0.0,
    momentum_dtype: torch.dtype | None = None,
    update_rms: float | None = None,
    cover_block: int | None = None,
    orthogonalize: Collection[str] = (),
) -> list[RankBytes]:
    """What each rank holds of a model that trains with SM3, exactly; activations and gathered weights come on top.

    Args:
        module: the model as it is before any wrapper; on the meta device it takes no memory.
        world: number of ranks.
        wrapper: ``"none"``, ``"ddp"``, ``"zero1"`` (``shard_over=`` over all ranks), ``"fsdp2"``, ``"hsdp"``, ``"tp"``
            (tensor parallel over all ranks), ``"fsdp1"`` (with ``use_orig_params=True``; padding is left out) or
            ``"fairscale"``.
        replicas: for HSDP the number of copies of the model, each sharded over ``world / replicas`` ranks.
        units: the submodules that are wrapped one by one before the root, such as ``model.blocks``: what is flattened
            together by FSDP1 and fairscale, and what has its gradients reduced together by FSDP2.
        tensor_parallel: for ``"tp"`` the dimension in which each parameter is cut, by its name; the others are
            replicated.
        shard_covers: as for :class:`sm3_dist.SM3`, and so are the options after it; all parameters are in one param
            group.
        step_in_backward: whether :func:`sm3_dist.step_in_backward` is used.
        momentum: see there.
        momentum_dtype: see there.
        update_rms: see there.
        cover_block: see there.
        orthogonalize: names of the tensors whose update is made orthogonal.

    Returns:
        for each rank its bytes.

    Raises:
        ValueError: for another wrapper, for several ranks without any, for fewer than 1, for replicas that do not
            divide them, for ``"tp"`` without ``tensor_parallel``, for names in that which the model does not have or
            dimensions that the parameter does not have, and for ``step_in_backward`` where it is refused.

    Example:
        >>> import torch, sm3_dist
        >>> with torch.device("meta"):
        ...     model = torch.nn.Linear(4096, 4096, dtype=torch.bfloat16)
        >>> first, second = sm3_dist.plan(model, world=2, wrapper="fsdp2")
        >>> first
    exchanged = exchange_bytes(orthogonal, ranks)
    for part, by_unit, buffer, buckets in zip(parts, gradients, owned, exchanged, strict=True):
        total = replace(RankBytes(*map(sum, zip(*map(astuple, part), strict=True))), exchanged=buckets)
        if total.sent:
            total = replace(total, sent=total.sent + FIELDS * widest)
    """
    check_plan(module, world, wrapper, replicas, tensor_parallel)
    if step_in_backward and (wrapper not in IN_BACKWARD or shard_covers):
        reason = "with shard_covers" if shard_covers else f"with wrapper={wrapper!r}"
        raise ValueError(f"no steps can be taken during backward {reason}; leave step_in_backward out")
    copies = replicas if wrapper == "hsdp" else 1
    ranks = world // copies
    kept = {p.dtype: accumulator_dtype(p.dtype).itemsize for p in module.parameters() if p.requires_grad}
    widest = max(kept.values(), default=0)  # accumulators of several types are sent in one buffer
    parts = [[RankBytes(0, 0, 0, 0, 0)] for _ in range(ranks)]
    named: dict[Tensor, str] = {param: name for name, param in module.named_parameters()}
    orthogonal: list[Pieces] = []
    gradients: list[dict[int, int]] = [{} for _ in range(ranks)]
    owned = [0] * ranks
    for number, piece in enumerate(rank_shards(module, wrapper, ranks, units, tensor_parallel)):
        param, shards = piece.param, piece.shards(cover_block)
        if param.requires_grad and named[param] in orthogonalize:
            orthogonal.append(piece)
        shared = [piece.shared(i, cover_block) for i in range(shards[0].accumulator_count)]
        unit = piece.unit if wrapper in ("fsdp2", "hsdp") else number
        for rank, (part, shard) in enumerate(zip(parts, shards, strict=True)):
            padding = piece.padding[rank] if piece.padding else 0
            stored = param.numel() if wrapper in REPLICATED else shard.numel + padding
            weights = param.element_size() * stored
            if not param.requires_grad:
                part.append(RankBytes(weights, 0, 0, 0, 0))
                continue
            entries = [
                box.numel
                for box, regions in zip(shard.stored, shared, strict=True)
                if not (shard_covers and any((region & box) == box for region in regions))
            ]
            beside = [box.numel for box, chunk in zip(shard.held, shard.chunks, strict=True) if chunk is not None]
            state = _STEP * piece.counted + kept[param.dtype] * (sum(entries) + sum(beside))
            if momentum > 0:
                elements = shard.numel + padding
                state += elements * (momentum_dtype.itemsize if momentum_dtype else kept[param.dtype])
            if update_rms is not None:
                state += _SQUARE_SUM
            reduced = widest * sum(box.numel for regions in shared for box in regions)
            if shard_covers:
                owned[rank] += reduced
            sent = reduced + kept[param.dtype] * sum(
                piece.lent(i, shards, rank) for i in range(shard.accumulator_count)
            )
            moments = 2 * param.element_size() * (shard.numel + padding)
            part.append(RankBytes(weights, weights, state, sent, moments))
            gradients[rank][unit] = gradients[rank].get(unit, 0) + weights
    result = []
    exchanged = exchange_bytes(orthogonal, ranks)
    for part, by_unit, buffer, buckets in zip(parts, gradients, owned, exchanged, strict=True):
        total = replace(RankBytes(*map(sum, zip(*map(astuple, part), strict=True))), exchanged=buckets)
        if total.sent:
            total = replace(total, sent=total.sent + FIELDS * widest)
        if step_in_backward:
            total = replace(total, gradients=max(by_unit.values(), default=0))
        if widest:  # with shard_covers each rank owns an equal part of the buffer
            total = replace(total, state=total.state + -(-buffer // widest // ranks) * widest)
        result.append(total)
    return result * copies


def check_plan(
    module: nn.Module, world: int, wrapper: str, replicas: int, tensor_parallel: Mapping[str, int] | None
) -> None:
    """Raise for what cannot be planned."""
    if wrapper not in WRAPPERS:
        raise ValueError(f"wrapper must be one of {', '.join(map(repr, WRAPPERS))}, but is {wrapper!r}")
    if world < 1 or (wrapper == "none" and world > 1):
        raise ValueError(f"{world} ranks with wrapper={wrapper!r}: name how they share the work, or take world=1")
    if wrapper == "hsdp" and (replicas < 1 or world % replicas):
        raise ValueError(f"{world} ranks cannot hold {replicas} replicas of equal size; replicas must divide the ranks")
    if wrapper != "tp":
        return
    if tensor_parallel is None:
        raise ValueError("wrapper='tp' needs tensor_parallel=, the dimension in which each parameter is cut, by name")
    params = dict(module.named_parameters())
    for name, axis in tensor_parallel.items():
        if name not in params:
            raise ValueError(f"tensor_parallel= names {name!r}, and the model has no parameter of that name")
        if not 0 <= axis < params[name].dim():
            raise ValueError(f"tensor_parallel= cuts {name!r} in dimension {axis}, and it has {params[name].dim()}")
