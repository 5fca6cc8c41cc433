"""What the C sources say, as a number, by which a library that was compiled from others is told.

Needs no torch: ``setup.py`` runs it as a file, before there is any.
"""

from __future__ import annotations

import ctypes
import zlib
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "kernels" / "c"
"""Of the sources, and of what is made of them."""


def checksum() -> int:
    """CRC-32 of the C sources.

    Example:
        >>> checksum() == checksum()
        True
    """
    return zlib.crc32(b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]"))))


def is_current(library: ctypes.CDLL) -> bool:
    """Whether a compiled library says that it was made from these sources."""
    if not hasattr(library, "sm3_sources"):
        return False
    library.sm3_sources.restype = ctypes.c_int64
    return bool(library.sm3_sources() == checksum())
