"""Clocks: how long a step takes, and how much memory it takes for itself, on a CPU and on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from launch.footprint.resident import forget_peak, peak, resident
from launch.job.world import UserError

Step = Callable[[], Any]
CYCLES = 2e9
"""Of a GPU in a second, at most."""
COPIED = 1 << 28
"""Bytes that are copied to find out how fast memory is: more than any cache holds."""


class Times(NamedTuple):
    """Seconds of one step: until all is done, until the host may go on, and of the device where the host is ahead.

    A GPU that is idle when a step begins waits for the host to launch something. After a backward pass it is not idle:
    the host has launched the step by the time that the GPU gets there.
    """

    whole: float
    host: float
    device: float


class Clock(Protocol):
    """What measures steps on one device."""

    def time(self, step: Step) -> Times:
        """Take a step and say how long it took."""

    def extra_bytes(self, step: Step) -> int | None:
        """Take a step, and say by how much it raises what is allocated; ``None`` where nobody tells."""


class HostClock:
    """On the CPU.

    Args:
        now: the clock that is read.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def time(self, step: Step) -> Times:
        start = self._now()
        step()
        seconds = self._now() - start
        return Times(seconds, seconds, seconds)

    def extra_bytes(self, step: Step) -> int | None:
        with suppress(UserError):  # no Linux
            forget_peak()
            before = resident()
            step()
            return max(0, peak() - before)
        return None


class GPUClock:
    """On the current CUDA device: the time between two events, before and after what a step launches."""

    def time(self, step: Step) -> Times:
        """Take two steps: one that the GPU waits for, and one that is launched while it does something else."""
        torch.cuda.synchronize()
        whole, host = self._between_events(step)
        torch.cuda._sleep(int((1.5 * host + 1e-3) * CYCLES))
        device, _ = self._between_events(step)
        return Times(whole, host, device)

    @staticmethod
    def _between_events(step: Step) -> tuple[float, float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        start = time.perf_counter()
        step()
        host = time.perf_counter() - start
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, host

    def extra_bytes(self, step: Step) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


CLOCKS: dict[str, Callable[[], Clock]] = {
    "wall": HostClock,
    "cpu": lambda: HostClock(time.process_time),
    "gpu": GPUClock,
}


def bandwidth(clock: Clock, device: str, rounds: int = 5) -> float:
    """Bytes per second of a copy from memory to memory, read and written ones counted; of the fastest of some."""
    here, there = (torch.zeros(COPIED // 4, dtype=torch.float32, device=device) for _ in range(2))
    seconds = min(clock.time(lambda: there.copy_(here)).whole for _ in range(rounds + 1))
    return 2 * COPIED / seconds


def name_of(device: str) -> str:
    """What the machine calls the device."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return "CPU"
