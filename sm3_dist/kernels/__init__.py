"""Backends: what takes the step of a list of tensors, and which of them can be used here.

The eager backend takes every tensor and is the definition. The others give the same bits, faster, for the tensors that
they take:

- ``"c"``: float32, bfloat16 and float16 tensors on the CPU; one pass over weight and gradient on
  ``torch.get_num_threads()`` threads.
- ``"triton"``: tensors of these types on a CUDA device, in a few launches.

``backend="auto"`` gives each tensor to the fastest backend that takes it; sparse gradients always go to the eager one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sm3_dist.compiled.library import no_look
from sm3_dist.kernels import triton
from sm3_dist.kernels.c import backend as cpu
from sm3_dist.kernels.eager import EagerKernel
from sm3_dist.layout.describe import local_tensor
from sm3_dist.maths.rms import Averaging
from sm3_dist.step.entry import Entry
from sm3_dist.step.kernel import Kernel

__all__ = ["BACKENDS", "Kernel", "Launcher", "available", "launch_list"]

FEW = 1024
"""So many elements are stepped in eager PyTorch without a word."""
MANY = 256
"""So many tensors on a GPU are looked at by Python without a word."""
NAMED = 10
"""So many tensors are named for each reason in a warning."""

BACKENDS = ("auto", "eager", "c", "triton")


def available() -> dict[str, str | None]:
    """For each backend ``None`` if it can be used here, else the reason why not.

    Example:
        >>> from sm3_dist import kernels
        >>> kernels.available()["eager"] is None
        True
    """
    return {"eager": None, "c": cpu.unavailable(), "triton": triton.unavailable()}


def launch_list(entries: Sequence[Entry], backend: str) -> list[Kernel]:
    """Share the tensors out among the backends: the kernels that a step launches, one after another.

    Args:
        entries: the tensors.
        backend: one of ``BACKENDS``; another than ``"auto"`` takes all tensors.

    Raises:
        ValueError: if that backend cannot take one of them; says why.
    """
    if backend == "eager":
        return [EagerKernel(entries)]
    taken: list[Kernel] = []
    for name, refusal, kernel in _FUSED:
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
        mine: dict[torch.device, list[Entry]] = {}
        for entry in entries:
            if id(entry.param) not in refused:
                mine.setdefault(local_tensor(entry.param).device, []).append(entry)
        entries = [entry for entry in entries if id(entry.param) in refused]
        taken += map(kernel, mine.values())
    return [*taken, EagerKernel(entries)] if entries else taken


@dataclass(frozen=True)
class Launcher:
    """What a plan makes kernels with.

    Attributes:
        backend: one of ``BACKENDS``.
    """

    backend: str

    def __call__(self, entries: Sequence[Entry]) -> list[Kernel]:
        """The kernels of some of a plan's tensors; see :func:`launch_list`."""
        return launch_list(entries, self.backend)

    def averaging(self, count: int, device: torch.device) -> Averaging | None:
        """What brings so many moving averages of squares up to date; ``None``: nothing does better than PyTorch.

        Args:
            count: how many.
            device: where they lie.
        """
        return triton.make_averages(count, device) if self.backend in ("auto", "triton") else None

    def review(self, entries: Sequence[Entry]) -> None:
        """Say in a warning why the host is slow, and in another what ``"auto"`` steps on a GPU by small operations.

        Args:
            entries: all tensors of the plan.
        """
        on_gpu = sum(map(_on_gpu, entries))
        if on_gpu > MANY and (reason := no_look()) is not None:
            warnings.warn(
                f"in each step sm3_dist looks in Python at {on_gpu} tensors on the GPU, which takes the host several "
                f"times as long as its compiled library: {reason}",
                stacklevel=2,
            )
        if self.backend != "auto":  # then somebody asked for it, or it raised an error
            return
        left: dict[str, list[str]] = {}
        for entry in entries:
            if entry.shard.numel > FEW and _on_gpu(entry) and (reason := triton.refusal(entry)) is not None:
                left.setdefault(reason, []).append(f"{entry.label} of shape {entry.shard.shape}")
        if not left:
            return
        lines = [f"{reason} {_listed(labels)}" for reason, labels in left.items()]
        warnings.warn(
            f"sm3_dist steps {sum(map(len, left.values()))} of {len(entries)} tensors on the GPU in eager PyTorch, up "
            "to a hundred times slower than by its kernel, which does not take them:\n" + "\n".join(lines),
            stacklevel=2,
        )


def _listed(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - NAMED} more" if len(labels) > NAMED else ""
    return f"({', '.join(labels[:NAMED])}{more})"


def _on_gpu(entry: Entry) -> bool:
    return local_tensor(entry.param).device.type == "cuda"


_FUSED: list[tuple[str, Callable[[Entry], str | None], Callable[[Sequence[Entry]], Kernel]]] = [
    ("c", cpu.refusal, cpu.CKernel),
    ("triton", triton.refusal, triton.make),
]
