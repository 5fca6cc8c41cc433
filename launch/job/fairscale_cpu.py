"""What fairscale's FullyShardedDataParallel needs to run without CUDA: stand-ins for streams, which do nothing.

On a CPU everything happens in the order in which it is written, so there is nothing for a stream to wait for. Two
arguments of the wrapper matter as well, see :data:`ARGUMENTS`. For trying fairscale out and for tests; with CUDA,
:func:`install` leaves torch and fairscale alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

ARGUMENTS: dict[str, Any] = {
    "compute_device": torch.device("cpu"),
    "bucket_cap_mb": 0,  # fairscale's buckets are reduced by a call that gloo refuses
}
"""Keyword arguments for the wrapper."""


class Stream:
    """A stream on which everything has happened already."""

    def wait_stream(self, other: object) -> None: ...

    def synchronize(self) -> None: ...


STREAM = Stream()


def install() -> None:
    """Put the stand-ins into place, where there is no CUDA. Calling it again does no harm."""
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    if torch.cuda.is_available() or torch.cuda.current_stream is _current_stream:
        return
    torch.cuda.current_stream = _current_stream
    torch.cuda.stream = lambda stream: nullcontext()  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[assignment,method-assign]
    set_up = FullyShardedDataParallel._setup_streams

    def set_up_with_streams(self: Any) -> None:
        set_up(self)
        for name in ("fp32_to_fp16", "all_gather", "post_backward"):
            self._streams.setdefault(name, STREAM)  # shared with the wrappers inside

    FullyShardedDataParallel._setup_streams = set_up_with_streams


def _current_stream(device: Any = None) -> Any:
    return STREAM
