"""What a model will need per rank, before anything is rented: reckoned from shapes, to the byte."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sm3_dist.layout.shard import accumulator_dtype
from sm3_dist.maths.orthogonal import TYPE
from sm3_dist.optimizer import SM3
from sm3_dist.planner.exchange_buffers import Pieces, exchange_bytes
from sm3_dist.planner.flat_parts import FlatParts
from sm3_dist.planner.rank_shards import Kind, Unit, each_shard, rank_shards
from sm3_dist.planner.rectangles import Rectangles
from sm3_dist.planner.sharding import Sharding
from sm3_dist.ranks.fingerprint import FIELDS
from sm3_dist.step.param_groups import ADAMW_LIKE, MATRIX, validate

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
        exchanged: with ``orthogonalize`` the buffers in which updates travel, within a step alone; besides, the owner
            of matrices takes about 10 bytes for each of their elements: of those of a bucket (25 MB) on a GPU, and
            elsewhere of one at a time, and 4 bytes for the others in its bucket.
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
    tp_size: int | None = None,
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
        tensor_parallel: for ``"tp"``, and where ``tp_size`` is given, the dimension in which each parameter is cut, by
            its name; the others are replicated.
        tp_size: for ``"fsdp2"`` and ``"hsdp"`` over how many ranks tensor parallelism cuts, those next to one another,
            before the wrapper cuts what is left over the others.
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
        ValueError: for another wrapper, for several ranks without any, for fewer than 1 or more than a million, for
            replicas that do not divide them, for tensor parallelism without ``tensor_parallel``, for names in that
            which the model does not have or dimensions that the parameter does not have, for ``step_in_backward`` where
            it is refused, and for options that SM3 refuses.

    Example:
        >>> import torch, sm3_dist
        >>> with torch.device("meta"):
        ...     model = torch.nn.Linear(4096, 4096, dtype=torch.bfloat16)
        >>> first, second = sm3_dist.plan(model, world=2, wrapper="fsdp2")
        >>> first
        RankBytes(weights=16781312, gradients=16781312, state=32776, sent=16400, adam_moments=33562624, exchanged=0)
    """
    if step_in_backward and (wrapper not in IN_BACKWARD or shard_covers):
        reason = "with shard_covers" if shard_covers else f"with wrapper={wrapper!r}"
        raise ValueError(f"no steps can be taken during backward {reason}; leave step_in_backward out")
    check_options(momentum, momentum_dtype, update_rms, cover_block)
    sharding = Sharding.of(
        module,
        world=world,
        wrapper=wrapper,
        replicas=replicas,
        units=units,
        tensor_parallel=tensor_parallel,
        tp_size=tp_size,
    )
    options = Options(shard_covers, momentum > 0, momentum_dtype, update_rms is not None, cover_block)
    ranks = _all_ranks(sharding, rank_shards(sharding), options, step_in_backward)
    if orthogonalize:
        if tp_size is not None and wrapper != "tp":
            raise ValueError("orthogonalize= is not planned together with tp_size=; leave one of them out")
        trained = {name for name, param in module.named_parameters() if param.requires_grad} & set(orthogonalize)
        pieces = [pieces_of(part) for name, part in each_shard(sharding) if name in trained]
        exchanged = exchange_bytes(pieces, sharding.ranks)
        ranks = [replace(rank, exchanged=count) for rank, count in zip(ranks, exchanged, strict=True)]
    return ranks * sharding.copies


def plan_muon_like(sharding: Sharding, *, shard_covers: bool = False) -> list[RankBytes]:
    """What each rank holds of a model that trains with :class:`sm3_dist.MuonLikeSM3`, float32 momentum and all.

    Args:
        sharding: the model, and how the ranks share it.
        shard_covers: as for :class:`sm3_dist.SM3`.

    Returns:
        for each rank its bytes; ``sent`` has two for each element of a matrix that it holds together with others, whose
        update goes to an owner and comes back.
    """
    recipes: tuple[dict[str, Any], ...] = (MATRIX, ADAMW_LIKE)
    matrices, others = (
        Options(shard_covers, True, None, own["update_rms"] is not None, own["cover_block"]) for own in recipes
    )
    units = rank_shards(sharding, matrices_first=True)
    return _all_ranks(sharding, units, replace(others, matrices=matrices), in_backward=False) * sharding.copies


def pieces_of(part: Rectangles | FlatParts) -> Pieces:
    """What an exchange of updates asks of what ranks hold."""
    along = isinstance(part, Rectangles)
    uncut = isinstance(part, Rectangles) and all(cut is None for cut in part.cuts)
    return Pieces(part.shape, part.boxes(), replicated=uncut, cut=along and not uncut)


@dataclass(frozen=True)
class Options:
    """Of SM3's options what the bytes depend on."""

    shard_covers: bool
    momentum: bool
    momentum_dtype: torch.dtype | None
    update_rms: bool
    cover_block: int | None
    matrices: Options | None = None
    """Of those whose update is made orthogonal, where they have others."""

    def of(self, kind: Kind) -> Options:
        """Those of a tensor."""
        return self.matrices if self.matrices is not None and kind.matrix else self


class _Totals:
    """What is added up for each rank, in bytes; of what is shared the entries, by the mesh dimensions of its group."""

    def __init__(self, ranks: int) -> None:
        self.weights, self.gradients, self.largest, self.state, self.moments, self.lent, self.updates = torch.zeros(
            (7, ranks), dtype=torch.int64, device="cpu"
        )
        self.shared: dict[tuple[int, ...], Tensor] = {}
        self.widest = 0  # accumulators of several types are sent in one buffer


def _all_ranks(sharding: Sharding, units: Collection[Unit], options: Options, in_backward: bool) -> list[RankBytes]:
    """The bytes of each rank of a copy."""
    totals = _Totals(sharding.ranks)
    for unit in units:
        _add(unit, sharding.replicated, options, totals)
    sent = sum(totals.shared.values(), start=torch.zeros_like(totals.state)) * totals.widest + totals.lent
    buckets = sum(((entries > 0).long() for entries in totals.shared.values()), start=torch.zeros_like(sent))
    sent += FIELDS * totals.widest * torch.maximum(buckets, (sent > 0).long())
    if options.shard_covers:  # each rank of a group owns an equal part of its buffer
        for axes, entries in totals.shared.items():
            members = math.prod(sharding.mesh[axis] for axis in axes)
            totals.state += -(-(entries + FIELDS * (entries > 0)) // members) * totals.widest
    gradients = totals.largest if in_backward else totals.gradients
    columns = torch.stack([totals.weights, gradients, totals.state, sent + totals.updates, totals.moments], 1)
    different, number = columns.unique(dim=0, return_inverse=True)
    ranks = [RankBytes(*row) for row in different.tolist()]
    return [ranks[k] for k in number.tolist()]


def _add(unit: Unit, replicated: bool, options: Options, totals: _Totals) -> None:
    """Add what every rank holds of some units that are alike."""
    pending = torch.zeros_like(totals.gradients)
    for holding in unit.holdings:
        kind, part, numel, times = holding.kind, holding.part, holding.numel, holding.times * unit.times
        own = options.of(kind)
        size, kept = kind.dtype.itemsize, accumulator_dtype(kind.dtype).itemsize
        stored = torch.full_like(numel, size * kind.numel) if replicated else size * numel
        totals.weights += times * stored
        if not kind.trained:
            continue
        pending += holding.times * stored
        totals.moments += times * 2 * size * numel
        totals.state += times * (_STEP * holding.counted + _SQUARE_SUM * own.update_rms)
        if own.momentum:
            moment = own.momentum_dtype.itemsize if own.momentum_dtype else kept
            totals.state += times * moment * numel
        totals.widest = max(totals.widest, kept)
        if own is not options and holding.cut:
            totals.updates += times * TYPE.itemsize * numel
        for cells in kind.cells(own.cover_block):
            entries, (shared, inside) = part.stored(cells), part.shared(cells)
            if own.shard_covers:
                entries = torch.where(inside, 0, entries)
            held, lent = part.beside(cells)
            totals.state += times * kept * (entries + held)
            totals.lent += times * kept * lent
            axes = part.peers(cells)
            totals.shared[axes] = totals.shared.get(axes, torch.zeros_like(shared)) + times * shared
    totals.gradients += unit.times * pending
    totals.largest = torch.maximum(totals.largest, pending)


def check_options(
    momentum: float, momentum_dtype: torch.dtype | None, update_rms: float | None, cover_block: int | None
) -> None:
    """Refuse what SM3 refuses.

    Raises:
        ValueError: says which option, its value and what to do.
    """
    usual = {name: parameter.default for name, parameter in inspect.signature(SM3).parameters.items()}
    given = {"momentum": momentum, "update_rms": update_rms, "cover_block": cover_block}
    validate({**usual, **given, "params": []}, 0, momentum_dtype)
