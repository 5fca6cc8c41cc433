"""BoxedTensor: a tensor of which this rank holds some boxes, in the form that PyTorch's checkpoints ask for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from sm3_dist.layout.box import Box
from sm3_dist.layout.groups import group_of

_aten = torch.ops.aten


class BoxedTensor(Tensor):
    """A tensor of which every rank holds some boxes. It has a shape, a type and a device, but no storage of its own.

    ``torch.distributed.checkpoint`` asks a tensor which chunks it would write, which it wants to read, and where they
    are: that is all that this class answers. It cannot be calculated with.

    Args:
        shape: of the whole tensor.
        boxes: what this rank holds; non-empty and disjoint.
        parts: for each box its elements, of the shape of the box. They are not copied: loading writes into them.
        owned: for each box whether this rank is the one that writes it.
        dtype: of the elements.
        device: of the parts.
        ranks: global ranks that hold the tensor together; all of them if none are given.
    """

    boxes: list[Box]
    parts: list[Tensor]
    owned: list[bool]
    ranks: tuple[int, ...]

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        boxes: Sequence[Box],
        parts: Sequence[Tensor],
        owned: Sequence[bool],
        dtype: torch.dtype,
        device: torch.device,
        ranks: Sequence[int] = (),
    ) -> BoxedTensor:
        """Make the shell."""
        shell = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)
        shell.boxes, shell.parts, shell.owned = list(boxes), list(parts), list(owned)
        shell.ranks = tuple(ranks)
        return shell

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"BoxedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, boxes={self.boxes})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Allow what PyTorch's checkpoint code does to every tensor; refuse the rest."""
        first: Any = args[0] if args else None
        if func is _aten.detach.default:
            return first.with_parts(first.parts)
        if func is _aten.new_empty.default:  # staging for asynchronous saving; it copies the attributes next
            device = (kwargs or {}).get("device") or first.device
            return cls(args[1], [], [], [], first.dtype, torch.device(device), first.ranks)
        if func is _aten._to_copy.default:
            copies = [func(part, **(kwargs or {})) for part in first.parts]
            device = (kwargs or {}).get("device") or first.device
            dtype = (kwargs or {}).get("dtype") or first.dtype
            return cls(first.shape, first.boxes, copies, first.owned, dtype, torch.device(device), first.ranks)
        raise NotImplementedError(
            f"{func} on a tensor of shape {tuple(first.shape) if isinstance(first, Tensor) else '?'} of which this "
            "rank holds only some boxes. Ask for full_state_dict=True to get whole tensors. To save asynchronously, "
            "call torch.distributed.checkpoint.async_save with checkpoint_id= and no storage_writer= (or with "
            "async_stager=DefaultStager(...)): a FileSystemWriter as the stager takes whole tensors alone."
        )

    def with_parts(self, parts: Sequence[Tensor]) -> BoxedTensor:
        """The same boxes with other values."""
        return BoxedTensor(self.shape, self.boxes, parts, self.owned, self.dtype, self.device, self.ranks)

    def read(self, box: Box) -> Tensor:
        """The elements of one box, all of which this rank must hold.

        Raises:
            ValueError: it does not hold all of them.
        """
        self.check(box)
        result = torch.empty(box.shape, dtype=self.dtype, device=self.device)
        for held, part in zip(self.boxes, self.parts, strict=True):
            common = held & box
            if common.numel:
                result[common.within(box)] = part[common.within(held)]
        return result

    def check(self, box: Box) -> None:
        """Raise unless this rank holds all elements of a box.

        Raises:
            ValueError: it does not; says what to do.
        """
        if sum((held & box).numel for held in self.boxes) != box.numel:
            raise ValueError(
                f"this rank holds {self.boxes} of a tensor of shape {tuple(self.shape)}, not all of {box}. State that "
                "was saved under another layout is resharded by torch.distributed.checkpoint.load, or loaded whole "
                "with full_state_dict=True."
            )

    def full(self) -> Tensor:
        """The whole tensor, on every rank that holds some of it. A collective over these ranks."""
        whole = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        group = holders(self.ranks)
        for box, part, owned in zip(self.boxes, self.parts, self.owned, strict=True):
            if owned or group is None:  # what somebody else owns may be out of date here: a scalar without elements
                whole[tuple(map(slice, box.start, box.stop))] = part
        if group is not None and dist.get_world_size(group) > 1 and whole.numel():
            # Every entry has one owner, and zero bytes elsewhere: a maximum of bytes puts them together whatever the
            # type, NaN and -0 included.
            dist.all_reduce(whole.view(-1).view(torch.uint8), op=dist.ReduceOp.MAX, group=group)
        return whole

    # What torch.distributed.checkpoint asks.

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """One item for each box that this rank owns."""
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk, owned in zip(self.__create_chunk_list__(), self.owned, strict=True)
            if owned
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """One chunk for each box, to be read."""
        return [ChunkStorageMetadata(offsets=torch.Size(box.start), sizes=torch.Size(box.shape)) for box in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The elements of the box that begins at ``index.offset``; disjoint boxes begin at different places."""
        for box, part in zip(self.boxes, self.parts, strict=True):
            if torch.Size(box.start) == index.offset:
                return part
        raise ValueError(f"no box of {index.fqn} begins at {index.offset}; there are {self.boxes}")


def holders(ranks: Sequence[int]) -> dist.ProcessGroup | None:
    """The group of these ranks, or of all; ``None`` where there is only this process."""
    if not dist.is_initialized():
        return None
    return group_of(ranks) if ranks else dist.group.WORLD


def who_differ(values: Iterable[Any], ranks: tuple[int, ...]) -> list[tuple[int, ...]]:
    """These ranks, and those that hold parts of values: they may fit some and not others. Smaller sets come first.

    Not all ranks: those of another pipeline stage have another model, and may have nothing to load.
    """
    if not dist.is_initialized():
        return []
    sets = {value.ranks for value in values if isinstance(value, BoxedTensor)} | {ranks}
    # (What other ranks wrote may name any.)
    known = [each for each in sets if dist.get_rank() in each and max(each) < dist.get_world_size()]
    return sorted(known, key=lambda each: (len(each), each))


def of_any_rank(error: Exception | None, ranks: Sequence[int]) -> Exception | None:
    """The error of this rank, or of the first of these, or of all, that has one. A collective over them."""
    group = holders(ranks)
    if group is None:
        return error
    said: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, error and str(error), group=group)
    numbers = dist.get_process_group_ranks(group)
    first = next((f"rank {rank}: {words}" for rank, words in zip(numbers, said, strict=True) if words), None)
    return error or (None if first is None else ValueError(first))


def of_all_ranks(names: Iterable[str], ranks: Sequence[int]) -> set[str]:
    """The names that one of these ranks has, or of all. A collective over them."""
    group = holders(ranks)
    if group is None:
        return set(names)
    theirs: list[list[str]] = [[]] * dist.get_world_size(group)
    dist.all_gather_object(theirs, list(names), group=group)
    return set().union(*theirs)
