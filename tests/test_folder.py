"""What a run writes beside its checkpoints, where a disk is full or a process was killed."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.job import records
from launch.job.folder import CHECKPOINTS, METRICS, PICTURE, Folder
from launch.job.world import UserError


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def logged(step: int) -> dict[str, Any]:
    return {"step": step, "train_bits_per_byte": 1.0}


def test_a_full_disk_does_not_end_a_run(tmp_path: Path) -> None:
    said: list[str] = []
    folder = Folder.claim(tmp_path, False, said.append)
    folder.log(logged(1))
    with full_disk((tmp_path / METRICS).stat().st_size + 10):
        for step in (2, 3):
            folder.log(logged(step))
        with pytest.raises(UserError, match=f"{PICTURE} could not be written to --out"):
            folder.finish(1.0, {})
    assert records.read(tmp_path / METRICS) == [logged(1)]
    assert (tmp_path / METRICS).read_bytes().endswith(b"\n"), "no line that is cut off"
    assert len(said) == 1, "once"
    assert f"{METRICS} cannot be written to, training goes on: File too large" in said[0]
    folder.draw = lambda *_: None  # type: ignore[method-assign]
    with pytest.raises(UserError, match=f"{METRICS} in --out .* lacks the last 2 line"):
        folder.finish(1.0, {})
    folder.log(logged(4))
    assert records.read(tmp_path / METRICS) == [logged(step) for step in (1, 2, 3, 4)]
    folder.finish(1.0, {})


def test_a_line_that_was_cut_off_harms_no_other(tmp_path: Path) -> None:
    file = tmp_path / METRICS
    file.write_bytes(b'{"step": 1}\n\x00\xff\n12\n{"st')
    records.append(file, {"step": 2}, {"step": 3})
    assert records.read(file) == [{"step": step} for step in (1, 2, 3)]
    assert records.read(tmp_path / "absent") == []


def test_a_run_that_has_ended_is_not_forgotten(tmp_path: Path) -> None:
    records.append(tmp_path / METRICS, logged(8), {"step": 8, "validation_bits_per_byte": 1.0})
    before = (tmp_path / METRICS).read_bytes()
    with pytest.raises(UserError, match="holds a run that has ended and left no checkpoint"):
        Folder.go_on(tmp_path, 0)
    assert (tmp_path / METRICS).read_bytes() == before
    assert Folder.go_on(tmp_path, 8).records == [logged(8)]


def test_checkpoints_on_another_disk_are_overwritten_there(tmp_path: Path) -> None:
    """A link was an error that said "None", after the metrics had been removed."""
    out, disk = tmp_path / "out", tmp_path / "disk"
    for folder in (out, disk / "step-00000003", disk / "other"):
        folder.mkdir(parents=True)
    (out / CHECKPOINTS).symlink_to(disk)
    Folder.claim(out, overwrite=True)
    assert [file.name for file in disk.iterdir()] == ["other"]
    assert (out / CHECKPOINTS).is_dir()
