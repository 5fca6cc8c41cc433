"""The moving averages of sums of squares on a GPU: in one launch, wherever each of them lies."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from sm3_dist.kernels.triton.launcher import Launcher
from sm3_dist.kernels.triton.tables import Table
from sm3_dist.maths import rms

STEPS, AFTER_FIRST = tl.constexpr(rms.STEPS), tl.constexpr(rms.AFTER_FIRST)
LANES = tl.constexpr(128)
"""Averages that a program brings up to date."""


@triton.jit
def take_sums(
    averages,  # int64, where each average lies
    sums,  # int64
    count,
):
    """Bring averages up to date with the sums of one more step: :func:`sm3_dist.maths.rms.averaged`."""
    number = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there = number < count
    total = tl.load(sums + number, mask=there, other=0)
    there &= total > 0
    average = tl.load(averages + number, mask=there, other=0).to(tl.pointer_type(tl.int64))
    before = tl.load(average, mask=there, other=0)
    moved = before - before // STEPS + total // STEPS
    tl.store(average, tl.where(before > 0, moved, tl.where(before < 0, total, AFTER_FIRST)), mask=there)


class AveragesKernel:
    """Brings averages up to date.

    Args:
        count: how many there are.
        device: where they lie.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._count, self._device = count, device
        self._table = Table(count, torch.int64, device)
        self._launch = Launcher()

    def __call__(self, addresses: Sequence[int], sums: Tensor) -> None:
        """Take the sums of one more step.

        Args:
            addresses: where the averages lie.
            sums: int64, contiguous, on their device.
        """
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            table = self._table.written(list(addresses))
            self._launch(take_sums, -(-self._count // int(LANES)), (table, sums, self._count))
