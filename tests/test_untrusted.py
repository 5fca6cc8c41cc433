"""Checkpoints that are damaged, and such as would run code."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Pool
from moving import build, fresh
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, TensorProperties
from torch.distributed.checkpoint.state_dict_saver import save

from sm3_dist.checkpoint import (
    CheckpointError,
    TrainState,
    load,
)


def loaded_by_two(folder: Path) -> None:
    load({"train": TrainState(*build("fsdp2", 2))}, folder)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (".metadata", lambda data: data[: len(data) // 2], "is damaged"),
        (".metadata", lambda data: b"", "is damaged"),
        (".metadata", None, "was not finished"),
        ("__0_0.distcp", lambda data: data[: len(data) // 2], "cannot load"),
        ("__0_0.distcp", None, "__0_0.distcp is missing"),
    ],
    ids=["truncated-metadata", "empty-metadata", "no-metadata", "truncated-file", "missing-file"],
)
def test_damaged_checkpoint(
    workers: Pool, saved: Path, file: str, damage: Callable[[bytes], bytes] | None, message: str
) -> None:
    path = saved / file
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    workers(2).run_raises(CheckpointError, loaded_by_two, saved, match=message)


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


class SetsAttribute:
    """Unpickled, it sets an attribute of a class."""

    def __reduce__(self) -> Any:
        from torch.distributed.checkpoint.metadata import Metadata

        return _identity, (Metadata,), (None, {"planted": 1})


def _identity(cls: type) -> type:
    return cls


def test_metadata_that_would_run_code(saved: Path, tmp_path: Path) -> None:
    metadata = FileSystemReader(saved).read_metadata()
    metadata.planner_data = Hostile(tmp_path / "mark")
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"it asks for .*mkdir"):
        load({"train": fresh()}, saved)
    assert not (tmp_path / "mark").exists()
    FileSystemReader(saved).read_metadata()  # the file is what this test takes it for
    assert (tmp_path / "mark").exists()


def test_metadata_that_changes_a_class(saved: Path) -> None:
    from torch.distributed.checkpoint.metadata import Metadata

    # A class on the stack, an attribute for it, BUILD.
    code = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}X\x07\x00\x00\x00plantedK\x01stb."
    assert pickle.loads(code) is Metadata
    assert vars(Metadata)["planted"] == 1
    del Metadata.planted  # type: ignore[attr-defined]
    (saved / ".metadata").write_bytes(code)
    with pytest.raises(CheckpointError, match="it changes"):
        load({"train": fresh()}, saved)
    assert "planted" not in vars(Metadata)


class Attribute:
    """Unpickled, it is an attribute of something."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


def test_metadata_as_early_releases_of_python_3_11_pickle_it(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = FileSystemReader(saved).read_metadata()
    monkeypatch.setattr(
        _MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self.name))
    )
    code = pickle.dumps(metadata)
    assert b"getattr" in code
    (saved / ".metadata").write_bytes(code)
    load({"train": fresh()}, saved)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("name", ["PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"])
def test_metadata_with_a_path_of_another_python_or_system(saved: Path, module: str, name: str) -> None:
    """Python 3.13 pickles where it defines them, and others have no such module."""
    metadata = FileSystemReader(saved).read_metadata()
    code = pickle.dumps(metadata, protocol=3)  # which names classes as text
    code, count = re.subn(rb"cpathlib(\._local)?\nPosixPath\n", f"c{module}\n{name}\n".encode(), code)
    assert count == 1
    (saved / ".metadata").write_bytes(code)
    load({"train": fresh()}, saved)


def test_metadata_of_a_later_pytorch(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may say more of a tensor, as 2.15 does, whose strides earlier ones do not know."""
    metadata = FileSystemReader(saved).read_metadata()
    pickled = TensorProperties.__getstate__
    with monkeypatch.context() as patch:
        patch.setattr(TensorProperties, "__getstate__", lambda self: (*pickled(self), (1, 2), "later"))
        (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    load({"train": fresh()}, saved)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(_MEM_FORMAT_ENCODING, "mro"), (_MEM_FORMAT_ENCODING, "__class__"), (TensorProperties, "TORCH_CONTIGUOUS_FORMAT")],
)
def test_metadata_that_asks_for_attributes(saved: Path, owner: Any, name: str) -> None:
    metadata = FileSystemReader(saved).read_metadata()
    metadata.planner_data = Attribute(owner, name)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=f"it asks for '{name}' of .*, which does not belong"):
        load({"train": fresh()}, saved)


def test_value_that_would_run_code(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    state = fresh().state_dict() | {"step": Hostile(tmp_path / "mark")}
    save({"train": state}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(CheckpointError, match=r"train\.step holds more than plain values"):
        load({"train": fresh()}, folder)
    assert not (tmp_path / "mark").exists()


def test_tensor_that_would_run_code(saved: Path, tmp_path: Path) -> None:
    """The bytes of one tensor replaced by a pickle in the same kind of archive."""
    metadata = FileSystemReader(saved).read_metadata()
    payload = io.BytesIO()
    torch.save(Hostile(tmp_path / "mark"), payload)
    assert zipfile.is_zipfile(payload)
    for index, info in metadata.storage_data.items():
        if index.fqn == "train.model.embed.weight":
            info.relative_path, info.offset, info.length = "__1_0.distcp", 0, len(payload.getvalue())
    (saved / "__1_0.distcp").write_bytes(payload.getvalue())
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=re.escape("UnpicklingError")):
        load({"train": fresh()}, saved)
    assert not (tmp_path / "mark").exists()


def test_metadata_that_names_files_elsewhere(saved: Path) -> None:
    metadata = FileSystemReader(saved).read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = "../secret"
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        load({"train": fresh()}, saved)
