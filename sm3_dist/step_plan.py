"""StepPlan: every tensor with its shard and state, and a bucket per process group. Made once, used every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from sm3_dist import adapters
from sm3_dist.bucket import MaxBucket, Slot
from sm3_dist.shard import WHOLE, LocalShard, Peers
from sm3_dist.update import Settings, update_rows, update_shard


@dataclass(frozen=True)
class Entry:
    """One original tensor: its parameter, what this rank holds of it, and its state.

    Attributes:
        param: the parameter of the optimizer that holds it.
        group: the param group of that parameter.
        shard: what this rank holds.
        accumulators: this rank's part of accumulator ``i``, of shape ``shard.stored[i].shape``.
        momentum_buffer: the local tensor, laid out like the parameter's; ``None`` without momentum.
        label: what error messages call it.
    """

    param: Tensor
    group: dict[str, Any]
    shard: LocalShard
    accumulators: Sequence[Tensor]
    momentum_buffer: Tensor | None
    label: str

    def describe(self) -> str:
        """One line, the same on every rank that plans this tensor."""
        options = {key: self.group[key] for key in ("lr", "momentum", "beta", "eps", "weight_decay", "maximize")}
        options["lr"] = float(options["lr"])
        settings = ", ".join(f"{key}={value}" for key, value in options.items())
        return (
            f"{self.label}: shape {self.shard.shape}, {self.param.dtype}, requires_grad={self.param.requires_grad}, "
            f"{self.shard.layout}, {settings}"
        )

    def update(self, settings: Settings) -> None:
        """Take one step, if the parameter has a gradient. Without one everything stays as it is."""
        grad = self.param.grad
        if grad is None:
            return
        if grad.is_sparse:
            if self.shard.layout != WHOLE:
                raise NotImplementedError(
                    f"{self.label} has a sparse gradient, which SM3 takes for unsharded parameters alone, but its "
                    f"layout is {self.shard.layout}. Use nn.Embedding(..., sparse=False) here."
                )
            update_rows(self.param, grad, self.accumulators, settings)
        elif self.shard.boxes:
            weight, grad = adapters.local(self.param), self._local_grad(grad)
            update_shard(self.shard, weight, grad, self.accumulators, self.momentum_buffer, settings)

    def _local_grad(self, grad: Tensor) -> Tensor:
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
        shard_covers: see :class:`~sm3_dist.bucket.MaxBucket`.
        groups: process groups by ranks, made so far; new ones are added.
    """

    def __init__(
        self, entries: Sequence[Entry], shard_covers: bool, groups: dict[tuple[int, ...], ProcessGroup]
    ) -> None:
        self.entries = entries
        self.buckets = _buckets(entries, shard_covers, groups)

    def receive(self) -> None:
        """Bring the accumulators up to date with what the other ranks sent at the end of the last step."""
        for bucket in self.buckets:
            bucket.finish()

    def send(self) -> None:
        """Send the new maxima."""
        for bucket in self.buckets:
            bucket.start()


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


def _buckets(
    entries: Sequence[Entry], shard_covers: bool, groups: dict[tuple[int, ...], ProcessGroup]
) -> list[MaxBucket]:
    """One bucket for each group of peers (and device), in the order in which the tensors first need them."""
    slots: dict[tuple[tuple[int, ...], torch.device], list[Slot]] = {}
    peers: dict[tuple[int, ...], Peers] = {}
    for entry in entries:
        for accumulator, stored, shared in zip(entry.accumulators, entry.shard.stored, entry.shard.shared, strict=True):
            if shared is not None:
                slot = Slot(accumulator, stored, shared.regions, contributes=bool(entry.shard.boxes))
                slots.setdefault((shared.peers.ranks, accumulator.device), []).append(slot)
                peers.setdefault(shared.peers.ranks, shared.peers)
    for ranks, these in peers.items():
        if ranks not in groups:
            groups[ranks] = these.group()
    return [MaxBucket(groups[ranks], these, device, shard_covers) for (ranks, device), these in slots.items()]
