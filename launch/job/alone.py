"""Alone: one program at a time writes to a directory."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launch.job.world import UserError

fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None  # Windows has none


@contextmanager
def alone(directory: Path | None) -> Iterator[None]:
    """Keep other programs on this machine out of a directory, which is made if need be, until the block is left.

    However a process ends, the directory is free then. One that was made and that nothing was put into is removed.

    Args:
        directory: which; ``None``: there is nothing to keep them out of.

    Raises:
        UserError: another program is at it, or it cannot be made.
    """
    if directory is None or fcntl is None:
        yield
        return
    try:
        made = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--out {directory} cannot be written to: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(
            f"another run is writing to --out {directory} at this moment; wait for its end, or choose another directory"
        ) from error
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(descriptor)
        if made:
            with suppress(OSError):  # there is something in it
                directory.rmdir()
