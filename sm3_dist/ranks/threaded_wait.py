"""A wait for a collective that ends in time although the collective's own does not.

Gloo's reduce-scatter alone of the collectives used here takes no notice of the timeout that its ``wait`` is given, and
does not know that it has ended before it was waited for.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Work


class ThreadedWait:
    """Waits for a collective in a thread of its own, and can itself be waited for again and again.

    Args:
        work: the collective, which nobody else waits for.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._error: RuntimeError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)  # of a rank that never comes, for ever
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as error:
            self._error = error

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait for its end, or so long.

        Raises:
            RuntimeError: it failed, with its own words; or "Operation timed out", as collectives of gloo have it.
        """
        self._thread.join(None if timeout is None else timeout.total_seconds())
        if self._thread.is_alive():
            raise RuntimeError(f"Operation timed out: {timeout}")
        if self._error is not None:
            raise self._error
        return True

    def is_completed(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()
