"""What accelerate, of which Trainer is made, remembers of its setup: a process of the tests sets it up many times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def accelerate_anew() -> Iterator[None]:
    """Have accelerate forget afterwards."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState, GradientState

    try:
        yield
    finally:
        for each in (AcceleratorState, GradientState, PartialState):
            each._reset_state()
