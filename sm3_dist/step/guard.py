"""FiniteGuard: a parameter whose gradient is not finite takes no step, on every rank alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from sm3_dist.layout.describe import local_tensor
from sm3_dist.layout.groups import group_of
from sm3_dist.layout.shard import Peers
from sm3_dist.maths.finite import not_finite
from sm3_dist.ranks.watch import RankWatch
from sm3_dist.step.capture import capturing
from sm3_dist.step.entry import Entry
from sm3_dist.step.gradient import settled_gradient

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

PARAMETER, STEP = "parameter", "step"
"""What ``skip_nonfinite`` may be."""
_WHAT = "the exchange of which gradients are not finite"


class FiniteGuard:
    """Finds the gradients that are not finite, before anything is made of them.

    Ranks that hold parts of a parameter tell one another, in one all-reduce for each process group and device. Replicas
    see the same gradients and decide alike.

    Args:
        entries: the tensors of a plan.
        groups: process groups by ranks, made so far; new ones are added.
        watch: this rank's view of the others.
    """

    def __init__(self, entries: Sequence[Entry], groups: dict[tuple[int, ...], ProcessGroup], watch: RankWatch) -> None:
        self._entries, self._watch, self._groups = entries, watch, groups
        self._labels: dict[Tensor, str] = {}
        self._together: dict[tuple[Peers | None, torch.device], list[Tensor]] = {}
        for entry in entries:
            if entry.param not in self._labels:
                self._labels[entry.param] = entry.label
                at = (peers_of(entry), local_tensor(entry.param).device)
                self._together.setdefault(at, []).append(entry.param)

    @property
    def is_shared(self) -> bool:
        """Whether this rank has a part of the gradient of some parameter, and others the rest."""
        return any(peers is not None for peers, _ in self._together)

    def here(self, params: Sequence[Tensor] | None = None) -> dict[Tensor, str]:
        """The parameters of which this rank's part of the gradient is not finite, each with what messages call it."""
        together = self._together.values() if params is None else [params]
        return self._named([(these, self._flags(these)) for these in together])

    def anywhere(self) -> dict[Tensor, str]:
        """Those of which any rank's part is not. A collective."""
        found, works = [], []
        for (peers, device), params in self._together.items():
            flags = self._flags(params)
            if peers is not None:
                works.append((self._send(flags, peers.ranks, peers.group), peers.ranks, device))
            found.append((params, flags))
        for work, ranks, device in works:
            self._watch.wait([work], _WHAT, ranks, device.type == "cpu")
        return self._named(found)

    def on_any_rank(self, found: bool) -> bool:
        """Whether ``found`` is true on any rank that holds part of these tensors. A collective, and the host waits."""
        holders = {tuple(sorted(entry.shard.ranks)): entry for entry in self._entries if entry.shard.ranks}
        for ranks in sorted(holders, key=lambda ranks: (len(ranks), ranks)):  # smaller sets lie within larger ones
            device = local_tensor(holders[ranks].param).device
            flag = torch.tensor(int(found), dtype=torch.int32, device=device)
            work = self._send(flag, ranks, partial(group_of, ranks))
            self._watch.wait([work], _WHAT, ranks, device.type == "cpu")
            found = bool(flag)
        return found

    def _send(self, flags: Tensor, ranks: tuple[int, ...], group: Callable[[], ProcessGroup]) -> Work | None:
        """Begin to make flags 1 that are so on any of these ranks."""
        if ranks not in self._groups:
            self._groups[ranks] = group()
        with self._watch.explained(_WHAT, ranks):
            work: Work | None = dist.all_reduce(flags, dist.ReduceOp.MAX, self._groups[ranks], async_op=True)
        return work

    @staticmethod
    def _flags(params: Sequence[Tensor]) -> Tensor:
        grads = [settled_gradient(param) for param in params]
        nothing = local_tensor(params[0]).new_empty(0, requires_grad=False)
        return not_finite([nothing if grad is None else grad for grad in grads])

    def _named(self, found: Sequence[tuple[Sequence[Tensor], Tensor]]) -> dict[Tensor, str]:
        """Those that are marked. Here the host waits for a GPU."""
        if any(capturing(flags.device) for _, flags in found):
            raise RuntimeError(
                "a CUDA graph is being captured, but skip_nonfinite has the host look at the gradients. Leave it out, "
                "or capture forward and backward, and call optimizer.step() outside of the graph."
            )
        marked = ((param, flag) for params, flags in found for param, flag in zip(params, flags.tolist(), strict=True))
        return {param: self._labels[param] for param, flag in marked if flag}


def peers_of(entry: Entry) -> Peers | None:
    """The ranks that must say whether their part of a gradient is finite; ``None`` where each has all of it."""
    return None if entry.shard.replicated else entry.shard.listeners or entry.shard.holders


class Skipping:
    """What an optimizer skips, and how often it did.

    Args:
        mode: of ``PARAMETER``, ``STEP`` and ``None``, for nothing.

    Attributes:
        steps: in how many steps something was skipped.

    Raises:
        ValueError: for another mode.

    Example:
        >>> Skipping("tensor")
        Traceback (most recent call last):
        ValueError: skip_nonfinite must be None, 'parameter' or 'step', but is 'tensor'
    """

    def __init__(self, mode: str | None) -> None:
        if mode not in (None, PARAMETER, STEP):
            raise ValueError(f"skip_nonfinite must be None, {PARAMETER!r} or {STEP!r}, but is {mode!r}")
        self.mode = mode
        self.steps = 0

    def __str__(self) -> str:
        return f"skip_nonfinite={self.mode}"

    @contextmanager
    def nonfinite(self, guard: FiniteGuard) -> Iterator[bool]:
        """Within it parameters have no gradient if theirs is not finite. Gives whether to take the step at all."""
        if self.mode is None:
            yield True
            return
        found = guard.anywhere() if self.mode == PARAMETER else guard.here()
        skips_all = self.mode == STEP and guard.on_any_rank(bool(found))
        if found or skips_all:
            self.note(found)
        with hidden(found):
            yield not skips_all

    def note(self, found: Mapping[Tensor, str]) -> None:
        """Count a step, and say so the first time."""
        self.steps += 1
        first, *others = found.values() or ["a parameter on another rank"]
        whose = first + (f" and of {len(others)} more parameters" if others else "")
        if self.steps == 1:
            what = "the step" if self.mode == STEP else "its update"
            warnings.warn(
                f"the gradient of {whose} is not finite (NaN or infinity): {what} is skipped, as {self!s} asks. This "
                "is said once; nonfinite_steps of the optimizer counts.",
                stacklevel=2,
            )


@contextmanager
def hidden(params: Iterable[Tensor]) -> Iterator[None]:
    """Let these parameters have no gradient for a while."""
    grads = {param: param.grad for param in params}
    for param in grads:
        param.grad = None
    try:
        yield
    finally:
        for param, grad in grads.items():
            param.grad = grad
