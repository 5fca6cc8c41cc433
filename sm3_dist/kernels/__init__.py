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

from sm3_dist.kernels import triton
from sm3_dist.kernels.c import backend as cpu
from sm3_dist.kernels.eager import EagerKernel
from sm3_dist.layout.describe import local_tensor
from sm3_dist.step.entry import Entry
from sm3_dist.step.kernel import Kernel

__all__ = ["BACKENDS", "Kernel", "available", "launch_list"]

FEW = 1024
"""So many elements are stepped in eager PyTorch without a word."""

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
        mine = [entry for entry in entries if id(entry.param) not in refused]
        entries = [entry for entry in entries if id(entry.param) in refused]
        if mine:
            taken.append(kernel(mine))
    for entry in entries:
        _warn_of_eager(entry)
    return [*taken, EagerKernel(entries)] if entries else taken


def _on_gpu(entry: Entry) -> bool:
    return local_tensor(entry.param).device.type == "cuda"


def _warn_of_eager(entry: Entry) -> None:
    """Tell that a tensor on a GPU is stepped by one small operation after another."""
    if entry.shard.numel > FEW and _on_gpu(entry):
        warnings.warn(
            f"sm3_dist steps {entry.label} of shape {entry.shard.shape} on the GPU in eager PyTorch, up to a hundred "
            f"times slower than by its kernel, which does not take it: {triton.refusal(entry)}",
            stacklevel=2,
        )


_FUSED: list[tuple[str, Callable[[Entry], str | None], Callable[[Sequence[Entry]], Kernel]]] = [
    ("c", cpu.refusal, cpu.CKernel),
    ("triton", triton.refusal, triton.make),
]
