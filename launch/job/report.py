"""The report: what a person sees while the model trains, and at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class Bar:
    """Progress of the training, or of the judging: a bar on a terminal, a line now and then in a log.

    Args:
        console: where to show it; a quiet one shows nothing.
        steps: how many there are.
        doing: what takes the time.
    """

    def __init__(self, console: Console, steps: int, doing: str = "training") -> None:
        self.console, self.steps = console, steps
        self.spoken = 0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=2,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(doing, total=steps, facts="")

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def advance(self) -> None:
        """Show one more step as done, on a terminal."""
        self.bar.advance(self.task)

    def show(self, step: int, train_bits_per_byte: float, lr: float, tokens_per_second: float) -> None:
        """Show where the run is after ``step`` steps."""
        facts = f"loss {train_bits_per_byte:.3f} bits  lr {lr:.2e}  {tokens_per_second:,.0f} tokens/s"
        self.bar.update(self.task, completed=step, facts=facts)
        if not self.console.is_terminal and (step >= self.spoken + self.steps / 20 or step == self.steps):
            self.spoken = step
            self.console.print(f"step {step:>6}/{self.steps}  {facts}", highlight=False)


class Stopwatch:
    """Times of something that happens again and again.

    Args:
        device: what does the work; a CUDA device is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what stands inside."""
        start = self.now()
        yield
        self.seconds.append(self.now() - start)

    def now(self) -> float:
        """Return the time, all work given out so far being done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def median_ms(self) -> float | None:
        """Return the median in milliseconds, not counting the first time, which sets things up."""
        return 1e3 * median(self.seconds[1:] or self.seconds) if self.seconds else None


def most_allocated(device: torch.device) -> int | None:
    """Return the most bytes that tensors have had on a GPU; ``None`` for the CPU, where nobody counts them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def table(title: str, rows: dict[str, str]) -> Table:
    """Return a table of two columns; rows whose name is indented belong to the one above."""
    result = Table(title=title, show_header=False, title_justify="left")
    result.add_column()
    result.add_column(justify="right")
    for name, value in rows.items():
        result.add_row(name, value)
    return result
