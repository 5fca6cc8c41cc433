"""The corpus: bytes to learn from, and bytes held out to be judged on."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from launch.job.world import UserError

HELD_OUT = 0.05  # share of the bytes
# Other people's packages, and the test suites that many distributions leave out of the standard library.
NOT_STANDARD = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """Text as bytes.

    Args:
        train: uint8, 1-D: what the model learns from.
        held_out: uint8, 1-D: what it never sees; from other files than ``train``.
        train_files, held_out_files: where they come from.
    """

    train: Tensor
    held_out: Tensor
    train_files: tuple[Path, ...]
    held_out_files: tuple[Path, ...]

    @property
    def digest(self) -> str:
        """A short name for exactly these bytes in exactly this order."""
        content = hashlib.sha256(self.train.numpy().tobytes())
        content.update(b"|" + self.held_out.numpy().tobytes())
        return content.hexdigest()[:16]


def load(path: Path | None = None, held_out_bytes: int | None = None) -> Corpus:
    """Read the corpus.

    Args:
        path: a directory, whose files are split into those to learn from and those held out; or one file, whose last
            part is held out. By default: the source files of Python's standard library.
        held_out_bytes: keep only so many of the bytes held out. By default: all.

    Raises:
        UserError: there is nothing to read, or not enough to hold something out.
    """
    try:
        whole = read_all(path)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; check --data and its permissions") from error
    return replace(whole, held_out=whole.held_out[:held_out_bytes])


def read_all(path: Path | None) -> Corpus:
    if path is None:
        root = standard_library()
        return split(file for file in root.rglob("*.py") if not NOT_STANDARD.intersection(file.relative_to(root).parts))
    if path.is_dir():
        return split(file for file in path.rglob("*") if not is_hidden(file.relative_to(path)))
    if path.is_file():
        return cut(path)
    missing = "is neither a file nor a directory" if path.exists() else "no such file or directory"
    raise UserError(f"--data {path}: {missing}")


def standard_library() -> Path:
    """Where Python has its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def is_hidden(file: Path) -> bool:
    """Whether a part of the path starts with a dot."""
    return any(part.startswith(".") for part in file.parts)


def split(files: Iterable[Path]) -> Corpus:
    """Hold out whole files. The split depends on the files' contents alone, and no content is on both sides."""
    contents: dict[str, tuple[Path, bytes]] = {}  # keyed by digest: copies of a file count once
    for file in sorted(files):
        if file.is_file() and (content := file.read_bytes()):
            contents.setdefault(hashlib.sha256(content).hexdigest(), (file, content))
    if len(contents) < 2:
        raise UserError(
            f"found {len(contents)} different files with text in them, and needs at least 2 to hold whole files out; "
            "pass a larger directory as --data, or one file, whose end is then held out"
        )
    shuffled = [contents[digest] for digest in sorted(contents)]  # digests are as good as random, and never change
    wanted = HELD_OUT * sum(len(content) for _, content in shuffled)
    count, held = 0, 0
    while held < wanted and count < len(shuffled) - 1:
        held += len(shuffled[count][1])
        count += 1
    return corpus(shuffled[count:], shuffled[:count])


def cut(file: Path) -> Corpus:
    """Hold out the end of one file."""
    content = file.read_bytes()
    if len(content) < 2:
        raise UserError(f"--data {file}: {len(content)} bytes are too few to learn from and to hold some out")
    edge = len(content) - max(1, round(HELD_OUT * len(content)))
    return corpus([(file, content[:edge])], [(file, content[edge:])])


def corpus(train: list[tuple[Path, bytes]], held_out: list[tuple[Path, bytes]]) -> Corpus:
    return Corpus(
        as_tensor(content for _, content in train),
        as_tensor(content for _, content in held_out),
        tuple(file for file, _ in train),
        tuple(file for file, _ in held_out),
    )


def as_tensor(contents: Iterable[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8)
