"""Backends: what takes the step of a list of tensors, and which of them can be used here.

The eager backend takes every tensor and is the definition. The others give the same bits, faster, for the tensors that
they take:

- ``"c"``: float32, bfloat16 and float16 tensors on the CPU; one pass over weight and gradient on
  ``torch.get_num_threads()`` threads.
- ``"triton"``: tensors of these types on a CUDA device, in a few launches.

``backend="auto"`` gives each tensor to the fastest backend that takes it; sparse gradients always go to the eager one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from sm3_dist.kernels import cpu, triton
from sm3_dist.kernels.eager import EagerWork

if TYPE_CHECKING:
    from sm3_dist.step_plan import Entry
    from sm3_dist.update import Settings

__all__ = ["BACKENDS", "Work", "available", "works"]

BACKENDS = ("auto", "eager", "c", "triton")


class Work(Protocol):
    """The tensors that one backend steps. Built once for a plan, used in every step."""

    def update(self, settings: Mapping[int, Settings]) -> None:
        """Take one step of every tensor that has a gradient, and count it.

        Args:
            settings: of each param group, by its ``id``.
        """


def available() -> dict[str, str | None]:
    """For each backend ``None`` if it can be used here, else the reason why not.

    Example:
        >>> from sm3_dist import kernels
        >>> kernels.available()["eager"] is None
        True
    """
    return {"eager": None, "c": cpu.unavailable(), "triton": triton.unavailable()}


def works(entries: Sequence[Entry], backend: str) -> list[Work]:
    """Share the tensors out among the backends.

    Args:
        entries: the tensors.
        backend: one of ``BACKENDS``; another than ``"auto"`` takes all tensors.

    Raises:
        ValueError: if that backend cannot take one of them; says why.
    """
    if backend == "eager":
        return [EagerWork(entries)]
    taken: list[Work] = []
    for name, refusal, work in _FUSED:
        if backend not in ("auto", name):
            continue
        # A parameter's tensors go together, for its gradient and its step counter are one.
        refused = {id(entry.param): reason for entry in entries if (reason := refusal(entry)) is not None}
        if backend == name and refused:
            entry = next(entry for entry in entries if id(entry.param) in refused)
            raise ValueError(
                f"backend={name!r} cannot step {entry.label} of shape {entry.shard.shape}: {refused[id(entry.param)]} "
                "Use backend='auto', which steps such tensors in eager PyTorch."
            )
        mine = [entry for entry in entries if id(entry.param) not in refused]
        entries = [entry for entry in entries if id(entry.param) in refused]
        if mine:
            taken.append(work(mine))
    return [*taken, EagerWork(entries)] if entries else taken


_FUSED: list[tuple[str, Callable[[Entry], str | None], Callable[[Sequence[Entry]], Work]]] = [
    ("c", cpu.refusal, cpu.CpuWork),
    ("triton", triton.refusal, triton.TritonWork),
]
