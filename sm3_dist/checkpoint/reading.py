"""Reading checkpoints of ``torch.distributed.checkpoint`` without running any code that is in them.

PyTorch's own reader unpickles the file ``.metadata`` and every value that is not a tensor, and a pickle can call
anything. Here both go through unpicklers that know a short list of harmless types.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as torch_load

from sm3_dist.checkpoint.boxed import of_any_rank
from sm3_dist.checkpoint.train_state import TrainState, check_version
from sm3_dist.maths.momentum_code import OLD_CODE, refusal_of_old_codes

_MEMORY_FORMATS: Any = metadata._MEM_FORMAT_ENCODING
_FIELDS = len(metadata.TensorProperties().__getstate__())


class _Properties(metadata.TensorProperties):
    """Of a tensor, without what later releases of PyTorch say besides: 2.15 adds the strides of what was saved."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        super().__setstate__(state[:_FIELDS])


_CLASSES = (
    metadata.Metadata,
    metadata.TensorStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.BytesStorageMetadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    _MEMORY_FORMATS,
    filesystem._StorageInfo,
    PurePosixPath,
    PureWindowsPath,
    torch.Size,
)
_PATHS = {cls.__name__.removeprefix(prefix): cls for cls in (PurePosixPath, PureWindowsPath) for prefix in ("", "Pure")}
"""What stands for paths, which are not used: one of another system could not be made."""
_KNOWN: dict[tuple[str, str], Any] = {
    **{(cls.__module__, cls.__name__): cls for cls in _CLASSES},
    (metadata.TensorProperties.__module__, metadata.TensorProperties.__name__): _Properties,
    # Python 3.13 says where it defines them.
    **{(module, name): cls for module in ("pathlib", "pathlib._local") for name, cls in _PATHS.items()},
    **{
        ("torch", str(value).removeprefix("torch.")): value
        for value in vars(torch).values()
        if isinstance(value, torch.dtype)
    },
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read. The message says which, and why."""


def load(state_dict: dict[str, Any], checkpoint_id: str | os.PathLike[str], *, no_dist: bool = False) -> None:
    """Load a checkpoint that ``torch.distributed.checkpoint.save`` wrote; no code in it is run. Call it on every rank.

    Like ``torch.distributed.checkpoint.load``, it loads in place, and calls ``load_state_dict`` of values that have it.

    Args:
        state_dict: what to load, such as ``{"train": TrainState(...)}``, with the keys under which it was saved.
        checkpoint_id: the directory.
        no_dist: whether this rank loads alone.

    Raises:
        CheckpointError: on every rank, if the checkpoint is incomplete or damaged, belongs to another model, was
            written in a newer format, or has something in it that would have to be run. What was loaded in place
            before the damage was found stays overwritten.
    """
    alone = no_dist or not dist.is_initialized()
    reader = SafeReader(checkpoint_id)
    states = {key: value for key, value in state_dict.items() if isinstance(value, TrainState)}
    try:
        _expect(states, reader, alone)
        torch_load(state_dict, storage_reader=reader, planner=SafeLoadPlanner(reader), no_dist=alone)
    except CheckpointException as error:
        rank, (reason, _) = min(error.failures.items())
        where = "" if alone else f" (rank {rank})"
        raise CheckpointError(f"cannot load the checkpoint {checkpoint_id}{where}: {explain(reason)}") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"cannot load the checkpoint {checkpoint_id}: {error}") from error
    finally:
        for value in states.values():
            value.expect_nothing()


class _Saved(NamedTuple):
    """What a checkpoint has of optimizers."""

    keys: dict[str, list[str]]
    """Of the state of each tensor."""
    groups: list[dict[str, Any]]
    """Param groups; empty where they have another form. Tensors in them are yet to be loaded."""


def _expect(states: Mapping[str, TrainState], reader: SafeReader, alone: bool) -> None:
    """Get states ready for what is to be loaded. Raise on every rank if it does not fit one: others may fit theirs."""
    found = _saved(reader, states, alone)
    error: Exception | None = None
    try:
        for key, value in states.items():
            value.expect(*found[key])
    except (TypeError, ValueError) as reason:
        error = reason
    error = error if alone else of_any_rank(error, ())
    if error is not None:
        raise error


def _saved(reader: SafeReader, keys: Iterable[str], alone: bool) -> dict[str, _Saved]:
    """What rank 0 finds, or this rank, under keys of its own; nothing if it cannot be read, as will show."""
    sent: list[dict[str, _Saved]] = [{}]
    if alone or dist.get_rank() == 0:
        sent = [{key: _try_saved(reader, key) for key in keys}]
    if not alone:
        dist.broadcast_object_list(sent, src=0)
    return {key: sent[0][key] if key in sent[0] else _try_saved(reader, key) for key in keys}


def _try_saved(reader: SafeReader, key: str) -> _Saved:
    with suppress(Exception):
        return _read_saved(reader, f"{key}.optimizer.")
    return _Saved({}, [])


def _read_saved(reader: SafeReader, prefix: str) -> _Saved:
    described = reader.checked_metadata()
    keys: dict[str, list[str]] = {}
    groups: dict[int, dict[str, Any]] = {}
    for path, value in described.state_dict_metadata.items():
        kind, _, rest = path.removeprefix(prefix).partition(".")
        if not path.startswith(prefix):
            continue
        if kind == "state":
            name, _, key = rest.rpartition(".")
            keys.setdefault(name, []).append(key)
        elif kind == "param_groups":
            number, _, option = rest.partition(".")
            if isinstance(value, metadata.TensorStorageMetadata):
                saved: Any = torch.zeros(value.size, dtype=value.properties.dtype, device="cpu")
            else:
                saved = _plain(reader.read_bytes(path, described), path)
            groups.setdefault(int(number), {})[option] = saved
    plain = all("." not in option for group in groups.values() for option in group)
    return _Saved(keys, [groups[number] for number in sorted(groups)] if plain else [])


def explain(reason: BaseException) -> str:
    """What went wrong, in words."""
    text = str(reason)
    if isinstance(reason, FileNotFoundError):
        return f"the file {reason.filename} is missing"
    if "Missing key" in text or "Size mismatch" in text:
        return f"{text}. It is the checkpoint of another model, or of an optimizer with other settings"
    return text if isinstance(reason, CheckpointError) else f"{type(reason).__name__}: {text}"


class SafeReader(FileSystemReader):
    """Reads a checkpoint's directory; ``.metadata`` may hold nothing but what describes tensors.

    Args:
        path: the directory.
    """

    refusal: CheckpointError | None = None
    """Why ``.metadata`` is not read."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What ``.metadata`` says, or nothing and the ``refusal``. The planner raises it: PyTorch 2.9 does not."""
        try:
            return self.checked_metadata()
        except CheckpointError as error:
            self.refusal = error
            return Metadata({})

    def checked_metadata(self) -> Metadata:
        """Read ``.metadata``.

        Raises:
            CheckpointError: if it is missing or damaged, or has anything else in it.
        """
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                found = _unpickle(file)
        except FileNotFoundError as error:
            raise CheckpointError(f"the file {path} is missing: the checkpoint was not finished, or is none") from error
        except CheckpointError as error:
            raise CheckpointError(f"{path} is not read: {error}") from error
        except Exception as error:
            raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise CheckpointError(f"{path} does not describe a checkpoint, but is a {type(found).__name__}")
        for info in found.storage_data.values():
            if not isinstance(info, filesystem._StorageInfo) or Path(info.relative_path).name != info.relative_path:
                raise CheckpointError(f"{path} names a file outside of the checkpoint: {info}")
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found

    def read_bytes(self, path: str, found: Metadata) -> io.BytesIO:
        """The bytes of one value that is not a tensor.

        Raises:
            CheckpointError: if there is none.
        """
        info = found.storage_data.get(metadata.MetadataIndex(path))
        if info is None:
            raise CheckpointError(f"it has no {path}: it is no TrainState, or that of another program")
        with (Path(self.path) / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            return io.BytesIO(file.read(info.length))


class SafeLoadPlanner(DefaultLoadPlanner):
    """Reads values that are not tensors with ``torch.load(weights_only=True)``, versions of the format before all else.

    Args:
        reader: reads the same checkpoint.
    """

    def __init__(self, reader: SafeReader) -> None:
        super().__init__()
        self.reader = reader

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Begin.

        Raises:
            CheckpointError: if the reader could not.
        """
        if self.reader.refusal:
            raise self.reader.refusal
        super().set_up_planner(*args, **kwargs)

    def create_local_plan(self) -> LoadPlan:
        """Plan what to read, if the checkpoint's format is one that this package knows.

        Raises:
            ValueError: if it is not.
            CheckpointError: if it has momentum in codes of another table.
        """
        assert self.metadata is not None
        for path, value in self.state_dict.items():
            name, _, key = path.rpartition(".")
            if path.endswith(".format_version") and not isinstance(value, torch.Tensor):
                check_version(_plain(self.reader.read_bytes(path, self.metadata), path))
            if key == "accumulator_0" and f"{name}.{OLD_CODE}" in self.metadata.state_dict_metadata:
                raise CheckpointError(refusal_of_old_codes(repr(name)))
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put one value into the state dict.

        Raises:
            CheckpointError: if something would have to be run to make it.
        """
        path = read_item.dest_index.fqn
        set_element(self.original_state_dict, self.mappings[path], _plain(value, path))


def _plain(value: io.BytesIO, path: str) -> Any:
    try:
        return torch.load(value, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than plain values: {str(error).splitlines()[0]}") from error


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler that knows the types of ``.metadata`` and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if (module, name) not in _KNOWN:
            raise CheckpointError(f"it asks for {module}.{name}, which does not belong into a checkpoint")
        return _KNOWN[module, name]


def _memory_format(owner: Any, name: str) -> Any:
    """What early releases of Python 3.11, as Debian 12 has, pickle of a member: ``getattr`` with its name."""
    if owner is not _MEMORY_FORMATS or name not in _MEMORY_FORMATS.__members__:
        raise CheckpointError(f"it asks for {name!r} of {owner}, which does not belong into a checkpoint")
    return getattr(_MEMORY_FORMATS, name)


def _unpickle(file: IO[bytes]) -> Any:
    """Unpickle ``.metadata``. A pickle can set attributes of classes too; they are put right at once."""
    before = [(cls, dict(vars(cls))) for cls in _CLASSES]
    try:
        return _MetadataUnpickler(file).load()
    finally:
        for cls, attributes in before:
            _put_right(cls, attributes)


def _put_right(cls: type, attributes: dict[str, Any]) -> None:
    changed = [name for name, value in vars(cls).items() if attributes.get(name, _put_right) is not value]
    for name in changed:
        if name in attributes:
            setattr(cls, name, attributes[name])
        else:
            delattr(cls, name)
    if changed:
        raise CheckpointError(f"it changes {changed} of {cls}, which does not belong into a checkpoint")
