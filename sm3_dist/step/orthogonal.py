"""The tensors of which a step makes the update orthogonal: for that one rank needs the whole of it.

Three phases, bucket by bucket. 1. Every rank takes the step of what it holds up to the update, which a kernel writes in
the place of a weight: it starts at 0 and is moved by a learning rate of -1. 2. The updates travel to one owner for each
matrix, are made orthogonal there, and travel back. 3. Every rank moves its weights along them. While a bucket travels
another one is worked on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from sm3_dist.layout.box import Box, place
from sm3_dist.layout.describe import local_tensor
from sm3_dist.layout.shard import unflattened
from sm3_dist.maths.orthogonal import TYPE, move_along, orthogonalized_together, work
from sm3_dist.maths.update import Settings
from sm3_dist.ranks.matrix_exchange import Matrix, MatrixExchange, bucketed, owners
from sm3_dist.ranks.same_gradients import GradientMismatchError
from sm3_dist.ranks.watch import RankWatch
from sm3_dist.step.entry import Entry

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from sm3_dist.step.kernel import Kernel

LaunchList = Callable[[Sequence[Entry]], "list[Kernel]"]


class OrthogonalSteps:
    """Takes the steps of tensors whose update is to be made orthogonal.

    Args:
        entries: these tensors.
        launch_list: makes of tensors the kernels that step them.
        groups: process groups by ranks, made so far; new ones are added.
        shared: parameters that hold other tensors too, which count their steps.
        watch: this rank's view of the others.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        launch_list: LaunchList,
        groups: dict[tuple[int, ...], ProcessGroup],
        shared: set[Tensor],
        watch: RankWatch,
    ) -> None:
        self.buckets = [_Bucket(launch_list, *bucket) for bucket in _buckets(entries, groups, watch)]
        self._stand_ins = [part for bucket in self.buckets for part in bucket.parts]
        self._counted = {e.param: e.step for e in entries if e.param not in shared}

    def update(self, settings: Mapping[int, Settings]) -> list[Tensor]:
        """Take one step of every tensor that has a gradient, and count it.

        Returns:
            The parameters that have one and hold no other tensors.

        Raises:
            GradientMismatchError: on every rank of a group, if some ranks have a gradient for their part of a tensor
                and others have none.
        """
        if not self.buckets:
            return []
        to_update = {group: replace(s, lr=-1.0, weight_decay=0.0) for group, s in settings.items()}
        if self._stand_ins:
            torch._foreach_copy_([p.stand_in.step for p in self._stand_ins], [p.entry.step for p in self._stand_ins])
        there: _Bucket | None = None  # travels to the owners
        back: _Bucket | None = None  # comes back
        try:
            for bucket in [*self.buckets, None, None]:
                if bucket is not None:
                    bucket.start(to_update)
                if there is not None:
                    there.exchange.transform(orthogonalized_together)
                if back is not None:
                    back.finish(settings)
                back, there = there, bucket
        finally:
            for bucket in self.buckets:
                bucket.exchange.close()
        stepped = [param for param in self._counted if param.grad is not None]
        if stepped:
            torch._foreach_add_([self._counted[param] for param in stepped], 1)
        return stepped


class _StandIn(Tensor):
    """A parameter that is bfloat16, as updates travel, with a gradient of any type.

    A plain tensor of PyTorch 2.9 takes none of another type than its own.
    """

    grad: Tensor | None = None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


@dataclass(frozen=True)
class _Part:
    """What this rank holds of one tensor.

    Attributes:
        entry: the tensor.
        stand_in: the same with the update in the place of the weights.
        take: the part of the parameter's gradient that belongs to it.
    """

    entry: Entry
    stand_in: Entry
    take: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, entry: Entry, flat: Tensor, order: tuple[int, ...] | None) -> _Part:
        """The part of a tensor whose update is written into ``flat``."""
        shard, momentum = entry.shard, entry.momentum_buffer
        numel = shard.numel
        if shard.replicated:
            start = place(shard.boxes[0].start, shard.shape) if numel else 0
            within = replace(shard, replicated=False, flat_start=0, flat_numel=numel)
            take: Callable[[Tensor], Tensor] = lambda grad: grad.reshape(-1).narrow(0, start, numel)  # noqa: E731
        elif shard.flat_start is not None:
            first = shard.flat_start if numel else 0
            within = replace(shard, flat_start=0, flat_numel=numel)
            take = lambda grad: grad.narrow(0, first, numel)  # noqa: E731
            momentum = None if momentum is None else momentum.narrow(0, first, numel)
        else:
            within, take = shard, lambda grad: grad
            flat = unflattened(flat, local_tensor(entry.param).shape, order)
        flat = flat.as_subclass(_StandIn)
        return cls(
            entry, replace(entry, param=flat, shard=within, momentum_buffer=momentum, step=entry.step.clone()), take
        )

    def give_gradient(self) -> bool:
        """Give the stand-in the gradient, if there is one."""
        grad = self.entry.param.grad
        if grad is None:
            return False
        if grad.is_sparse:
            raise NotImplementedError(
                f"{self.entry.label} has a sparse gradient, whose update cannot be made orthogonal. Put the parameter "
                "into a param group with orthogonalize=False, or use nn.Embedding(..., sparse=False)."
            )
        if self.entry.shard.boxes:
            self.stand_in.param.grad = self.take(self.entry.local_grad(grad))
        return True

    def move(self, settings: Settings) -> None:
        """Move the weights."""
        entry, stand_in = self.entry, self.stand_in
        if entry.param.grad is not None:
            settings = replace(settings, rounding=entry.rounding())
            directions = stand_in.shard.views(stand_in.param)
            move_along(entry.shard, local_tensor(entry.param), directions, settings)


class _Bucket:
    """Some tensors that are held by the same ranks.

    Args:
        launch_list: makes of tensors the kernels that step them.
        entries: the tensors.
        exchange: brings their updates to the owners and back; its matrices are these tensors.
    """

    def __init__(self, launch_list: LaunchList, entries: Sequence[Entry], exchange: MatrixExchange) -> None:
        self.exchange = exchange
        self.parts = [
            _Part.of(entry, flat, matrix.order)
            for entry, flat, matrix in zip(entries, exchange.parts, exchange.matrices, strict=True)
        ]
        held = [part.stand_in for part in self.parts if part.entry.shard.boxes]
        self._kernels = launch_list(held) if held else []
        exchange.close()

    def start(self, settings: Mapping[int, Settings]) -> None:
        """Work out the updates and send them."""
        self.exchange.open()
        present = [part.give_gradient() for part in self.parts]
        for kernel in self._kernels:
            kernel.update(settings)
        for part in self.parts:
            part.stand_in.param.grad = None
        self.exchange.send(present)

    def finish(self, settings: Mapping[int, Settings]) -> None:
        """Receive the orthogonal updates and take them."""
        for m in self.exchange.finish():
            raise GradientMismatchError(
                f"{self.parts[m].entry.label} has a gradient on some of the ranks that hold parts of it, and none on "
                "others. A step makes its update orthogonal, for which it needs all of it: let every rank have a "
                "gradient, of zeros where there is nothing else, or none."
            )
        for part in self.parts:
            part.move(settings[id(part.entry.group)])
        self.exchange.close()


def is_orthogonal(entry: Entry) -> bool:
    """Whether the update of this tensor is to be made orthogonal."""
    wanted = entry.group["orthogonalize"]
    if not isinstance(wanted, bool):
        wanted = entry.shard.name in wanted
    return wanted and len(entry.shard.shape) > 1 and 0 not in entry.shard.shape


def _buckets(
    entries: Sequence[Entry], groups: dict[tuple[int, ...], ProcessGroup], watch: RankWatch
) -> Iterator[tuple[list[Entry], MatrixExchange]]:
    """The tensors, bucket by bucket, in an order that all who hold parts of them agree on."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    alike: dict[tuple[tuple[int, ...], torch.device], list[Entry]] = {}
    loads: dict[tuple[int, ...], dict[int, int]] = {}  # by those who hold tensors together
    for entry in entries:
        shard, device = entry.shard, local_tensor(entry.param).device
        ranks = shard.holders.ranks if shard.holders else ()
        alike.setdefault((ranks, device), []).append(entry)
        if shard.holdings and not shard.holders:
            load = loads.setdefault(shard.holdings.peers.ranks, {})
            (owner,) = (other for other, boxes in shard.holdings.boxes().items() if boxes)
            load[owner] = load.get(owner, 0) + work(shard.shape)
    for (ranks, device), these in alike.items():
        group = None
        if ranks:
            holders = these[0].shard.holders
            assert holders is not None
            if ranks not in groups:
                groups[ranks] = holders.group()
            group = groups[ranks]
        else:
            these = [entry for entry in these if entry.shard.boxes]
        matrices, order = _matrices(these, rank, bool(ranks), loads.get(ranks))
        matrices, these = [matrices[k] for k in order], [these[k] for k in order]
        for bucket in bucketed(matrices, TYPE.itemsize):
            exchange = MatrixExchange([matrices[k] for k in bucket], group, rank, TYPE, device, watch)
            yield [these[k] for k in bucket], exchange


def _matrices(
    entries: Sequence[Entry], rank: int, travel: bool, loads: Mapping[int, int] | None
) -> tuple[list[Matrix], list[int]]:
    """The tensors with their owners, and the order in which they go into buckets."""
    boxes: list[dict[int, tuple[Box, ...]]] = []
    for entry in entries:
        holdings = entry.shard.holdings
        boxes.append(holdings.boxes() if travel and holdings else {rank: entry.shard.boxes})
    works = [work(entry.shard.shape) for entry in entries]
    holders = [{r: sum(box.numel for box in held) for r, held in each.items()} for each in boxes]
    chosen, order = owners(works, holders, loads)
    return [
        Matrix(entry.shard.shape, _order(entry), held, owner)
        for entry, held, owner in zip(entries, boxes, chosen, strict=True)
    ], order


def _order(entry: Entry) -> tuple[int, ...] | None:
    """The order in which the dimensions lie in memory, the same on every rank; ``None`` for ``0, 1, …``."""
    shard = entry.shard
    if shard.replicated or shard.flat_start is not None:
        return shard.order
    stride = entry.param.stride()
    order = tuple(sorted(range(len(stride)), key=lambda d: -stride[d]))
    return None if order == tuple(range(len(stride))) else order
