"""StepPlan: every tensor with its shard and state, and a bucket per process group. Made once, used every step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from sm3_dist import adapters, kernels
from sm3_dist.bucket import MaxBucket, Slot, SumBucket
from sm3_dist.groups import new_group
from sm3_dist.param_groups import correction, correction_of, first_rms
from sm3_dist.publish import Parts, Publisher
from sm3_dist.rms import CUT_OFF, SquareSum
from sm3_dist.rounding import Rounding
from sm3_dist.shard import WHOLE, LocalShard, Peers
from sm3_dist.update import Settings, update_rows, update_shard

HYPERPARAMETERS = (
    *("lr", "momentum", "beta", "eps", "weight_decay", "maximize"),
    *("bias_correction", "nesterov", "update_rms", "cover_block", "cover_product"),
    *("stochastic_rounding", "rounding_seed"),
)


@dataclass(frozen=True)
class Entry:
    """One original tensor: its parameter, what this rank holds of it, and its state.

    Attributes:
        param: the parameter of the optimizer that holds it.
        group: the param group of that parameter.
        shard: what this rank holds.
        accumulators: this rank's part of accumulator ``i``, of shape ``shard.stored[i].shape``.
        momentum_buffer: the local tensor, laid out like the parameter's, int8 for codes; ``None`` without momentum.
        step: how many steps the parameter has taken; 0-dimensional, on the parameter's GPU if it lies on one.
        squares: the sum that ``update_rms`` goes by; ``None`` without.
        label: what error messages call it.
        number: its place among the tensors of the optimizer, the same under every layout; keys its random numbers.
    """

    param: Tensor
    group: dict[str, Any]
    shard: LocalShard
    accumulators: Sequence[Tensor]
    momentum_buffer: Tensor | None
    step: Tensor
    squares: SquareSum | None
    label: str
    number: int = 0

    def describe(self) -> str:
        """One line, the same on every rank that plans this tensor."""
        options = {key: self.group[key] for key in HYPERPARAMETERS}
        options["lr"] = float(options["lr"])
        settings = ", ".join(f"{key}={value}" for key, value in options.items())
        if self.momentum_buffer is not None:
            settings += f", momentum in {self.momentum_buffer.dtype}"
        if self.rounds:
            settings += f", number {self.number}"
        return (
            f"{self.label}: shape {self.shard.shape}, {self.param.dtype}, requires_grad={self.param.requires_grad}, "
            f"{self.shard.layout}, {settings}"
        )

    @property
    def rounds(self) -> bool:
        """Whether weight or momentum is rounded stochastically."""
        types = [tensor.dtype for tensor in (self.param, self.momentum_buffer) if tensor is not None]
        return torch.int8 in types or (bool(self.group["stochastic_rounding"]) and torch.bfloat16 in types)

    def update(self, settings: Settings) -> None:
        """Take one step, if the parameter has a gradient. Without one everything stays as it is."""
        grad = self.param.grad
        if grad is None:
            return
        settings = self._of_this_tensor(settings)
        if grad.is_sparse:
            if self.squares is not None or self.shard.cover_block is not None or self.rounds:
                raise NotImplementedError(
                    f"{self.label} has a sparse gradient, which SM3 takes without update_rms, cover_block, "
                    "stochastic_rounding and 8-bit momentum alone. Put it into a param group of its own with "
                    "update_rms=None, cover_block=None, cover_product=False, stochastic_rounding=False, and with "
                    "momentum=0 and nesterov=False, which sparse gradients do not use."
                )
            if self.shard.layout != WHOLE:
                raise NotImplementedError(
                    f"{self.label} has a sparse gradient, which SM3 takes for unsharded parameters alone, but its "
                    f"layout is {self.shard.layout}. Use nn.Embedding(..., sparse=False) here."
                )
            update_rows(self.param, grad, self.accumulators, settings)
        elif self.shard.boxes:
            weight, grad = adapters.local(self.param), self.local_grad(grad)
            update_shard(self.shard, weight, grad, self.accumulators, self.momentum_buffer, settings, self.squares)

    def _of_this_tensor(self, settings: Settings) -> Settings:
        """The settings of the group, with what depends on the steps that this tensor has taken."""
        if self.group["bias_correction"]:
            settings = replace(settings, correction=self._correction())
        if self.squares is not None:
            scale = self.squares.scale(self.group["update_rms"], first_rms(self.group), self.accumulators[0].dtype)
            settings = replace(settings, scale=scale, limit=CUT_OFF * self.group["update_rms"])
        if self.rounds:
            seed, bfloat16 = self.group["rounding_seed"], bool(self.group["stochastic_rounding"])
            rounding = Rounding(seed, int(self.step.item()), self.number, self.shard.shape, bfloat16)
            settings = replace(settings, rounding=rounding)
        return settings

    def _correction(self) -> float | Tensor:
        """What corrects ``nu`` for its start at 0. The host does not wait for a GPU to tell the number of steps."""
        if self.step.device.type == "cpu":
            return correction_of(self.group, self.step.item())
        beta = torch.full_like(self.step, self.group["beta"], dtype=torch.float64)
        return correction(beta, self.step).to(self.accumulators[0].dtype)

    def local_grad(self, grad: Tensor) -> Tensor:
        """The gradient of exactly the elements that this rank holds."""
        if isinstance(self.param, DTensor):
            if not isinstance(grad, DTensor):
                raise TypeError(
                    f"{self.label} is a DTensor, but its gradient is a plain tensor of shape {tuple(grad.shape)}. "
                    "Assign a DTensor with the parameter's mesh and placements."
                )
            if grad.placements != self.param.placements:  # Partial, where autograd left the reduction to the optimizer
                grad = grad.redistribute(self.param.device_mesh, self.param.placements)
        return adapters.local(grad)


class StepPlan:
    """What one step works through.

    Args:
        entries: the tensors, in the order of the param groups.
        backend: one of ``kernels.BACKENDS``.
        shard_covers: see :class:`~sm3_dist.bucket.MaxBucket`.
        groups: process groups by ranks, made so far; new ones are added.
        publisher: brings the new weights to the other ranks, where parameters are replicated.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        backend: str,
        shard_covers: bool,
        groups: dict[tuple[int, ...], ProcessGroup],
        publisher: Publisher | None = None,
    ) -> None:
        self.entries = entries
        self._groups = groups
        self.buckets = _buckets(entries, shard_covers, groups)
        self.publisher = publisher
        stages = _stages(entries, publisher)
        self._stages = [(kernels.works(entries, backend), weights) for entries, weights in stages]

    def receive(self) -> None:
        """Bring the accumulators up to date with what the other ranks sent at the end of the last step."""
        for bucket in self.buckets:
            bucket.finish()

    def update(self, settings: Mapping[int, Settings]) -> None:
        """Update every entry, from the settings of its param group by ``id``. New weights leave as they are made."""
        for works, weights in self._stages:
            for work in works:
                work.update(settings)
            if self.publisher is not None and weights is not None:
                self.publisher.start(weights)

    def take_over(self, older: StepPlan) -> None:
        """Go on adding squares where another plan was, for steps that are taken before they are sent."""
        before = {(entry.param, entry.number): entry.squares for entry in older.entries}
        for entry in self.entries:
            squares = before.get((entry.param, entry.number))
            if squares is not None and entry.squares is not None:
                entry.squares.partial.copy_(squares.partial)

    def forget(self) -> None:
        """Forget the squares of a step that failed on the way, so that the next one does not count them."""
        for entry in self.entries:
            if entry.squares is not None:
                entry.squares.partial.zero_()

    def on_any_rank(self, found: bool) -> bool:
        """Whether ``found`` is true on any rank that holds part of these tensors. A collective, and the host waits."""
        holders = {tuple(sorted(entry.shard.ranks)): entry for entry in self.entries if entry.shard.ranks}
        for ranks in sorted(holders, key=lambda ranks: (len(ranks), ranks)):  # smaller sets lie within larger ones
            if ranks not in self._groups:
                self._groups[ranks] = new_group(ranks)
            flag = torch.tensor(float(found), device=adapters.local(holders[ranks].param).device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._groups[ranks])
            found = bool(flag)
        return found

    def send(self) -> None:
        """Send the new maxima, and wait for the weights that other ranks updated."""
        for bucket in self.buckets:
            bucket.start()
        if self.publisher is not None:
            self.publisher.finish()


def agreement_lines(entries: Iterable[Entry]) -> dict[tuple[int, ...], list[str]]:
    """The plan in words, for each set of ranks that must agree on it.

    A set also hears of tensors that lie on a larger set: whoever lacks one of those differs here at the latest.
    """
    entries = [entry for entry in entries if entry.shard.ranks]
    lines: dict[tuple[int, ...], list[str]] = {}
    for ranks in {entry.shard.ranks for entry in entries}:
        wider = {other for other in {entry.shard.ranks for entry in entries} if set(ranks) <= set(other)}
        lines[tuple(sorted(ranks))] = [entry.describe() for entry in entries if entry.shard.ranks in wider]
    return lines


def _stages(entries: Sequence[Entry], publisher: Publisher | None) -> list[tuple[list[Entry], Parts | None]]:
    """Entries to update one after another, each time with the bucket of weights that can leave then."""
    if publisher is None:
        return [(list(entries), None)]
    waiting: list[Entry] = list(entries)
    stages: list[tuple[list[Entry], Parts | None]] = []
    for bucket in publisher.buckets:
        needed = publisher.waits_for(bucket)
        stages.append(([entry for entry in waiting if entry.param in needed], bucket))
        waiting = [entry for entry in waiting if entry.param not in needed]
    return [*stages, (waiting, None)]


def _buckets(
    entries: Sequence[Entry], shard_covers: bool, groups: dict[tuple[int, ...], ProcessGroup]
) -> list[MaxBucket | SumBucket]:
    """One bucket of each kind for each group of peers (and device), in the order in which the tensors need them."""
    slots: dict[tuple[tuple[int, ...], torch.device], list[Slot]] = {}
    sums: dict[tuple[tuple[int, ...], torch.device], list[SquareSum]] = {}
    peers: dict[tuple[int, ...], Peers] = {}
    for entry in entries:
        for accumulator, stored, shared in zip(entry.accumulators, entry.shard.stored, entry.shard.shared, strict=True):
            if shared is not None:
                slot = Slot(accumulator, stored, shared.regions, contributes=bool(entry.shard.boxes))
                slots.setdefault((shared.peers.ranks, accumulator.device), []).append(slot)
                peers.setdefault(shared.peers.ranks, shared.peers)
        if entry.squares is not None:
            holders = entry.shard.holders
            ranks = holders.ranks if holders else ()
            sums.setdefault((ranks, entry.squares.average.device), []).append(entry.squares)
            if holders:
                peers.setdefault(ranks, holders)
    for ranks, these in peers.items():
        if ranks not in groups:
            groups[ranks] = these.group()
    maxima = [MaxBucket(groups[ranks], these, device, shard_covers) for (ranks, device), these in slots.items()]
    return [*maxima, *(SumBucket(groups.get(ranks), these) for (ranks, _), these in sums.items())]
