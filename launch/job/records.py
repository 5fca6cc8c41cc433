"""Records: values of JSON, one on each line of a file that grows while a program runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def read(file: Path) -> list[dict[str, Any]]:
    """All of a file, none if there is no file; a line that was cut off, by a full disk or a kill, counts as none."""
    lines = file.read_bytes().splitlines() if file.exists() else []
    return list(_parsed(lines))


def _parsed(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def append(file: Path, *records: dict[str, Any]) -> None:
    """Add records, each on a line of its own, whatever stands before.

    Raises:
        OSError: it cannot be written to; the file is as it was.
    """
    with file.open("a+b", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 1))
        gap = b"" if stream.read(1) in (b"", b"\n") else b"\n"
        left = gap + b"".join(json.dumps(record).encode() + b"\n" for record in records)
        try:
            while left:  # a disk may take the first part alone
                left = left[stream.write(left) :]
        except OSError as error:
            stream.truncate(size)
            raise OSError(error.errno, error.strerror, str(file)) from None
