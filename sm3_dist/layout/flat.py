"""Flattened parameters: torch's FullyShardedDataParallel (FSDP1) and fairscale's.

These wrappers lay tensors one after another in a flat one and give each rank an equal part of it, wherever that cuts.
A part of an original tensor is a few boxes, and every rank can reckon those of all others. So each knows, without
asking, which accumulator entries two or more of them touch: the rows in which one part ends and the next begins, and
the other dimensions of tensors that are cut at all. A tensor that lies whole on one rank shares nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from weakref import ReferenceType, ref

from torch import Tensor, nn

from sm3_dist.layout.box import Box, flat_boxes
from sm3_dist.layout.flat_metadata import FlatTensor, Original, clean, flat_tensors, held, is_flattened
from sm3_dist.layout.ranges import reordered, shared_entries
from sm3_dist.layout.shard import Holdings, LocalShard, in_words


class Flattened:
    """The flattened parameters of a model.

    Args:
        model: the wrapped root module; ``None`` if the user named none.

    Raises:
        TypeError: if it is no module.
    """

    def __init__(self, model: nn.Module | None) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model= takes the root module, as wrapped, but got a {type(model).__name__}")
        self.model = model
        self._places: dict[tuple[str, str], ReferenceType[Tensor]] = {}
        self.read()
        self.numbered(())

    def read(self) -> None:
        """Read the model anew: it may have been wrapped since."""
        self._tensors = list(flat_tensors(self.model)) if self.model is not None else []
        self._found: dict[Tensor, tuple[FlatTensor, tuple[Original, ...]]] = {}
        for tensor in self._tensors:
            self._found[tensor.param] = (tensor, tensor.originals)
            for original in tensor.originals:
                if original.param is not None:
                    self._found[original.param] = (tensor, (original,))

    def __contains__(self, param: Tensor) -> bool:
        """Whether a wrapper flattened ``param``, or it stands for a part of what one flattened."""
        return param in self._found

    @property
    def by_fairscale(self) -> bool:
        """Whether ranks have parts that fairscale cut, which PyTorch takes for the same on every rank."""
        return any("fairscale" in tensor.wrapper and tensor.peers is not None for tensor in self._tensors)

    def names(self, param: Tensor) -> list[str]:
        """The names of the original tensors of a flattened parameter, in the order of its shards."""
        return [original.name for original in self.originals(param)]

    def originals(self, param: Tensor) -> tuple[Original, ...]:
        """The original tensors in a parameter that a wrapper flattened, or that stands for one of those."""
        return self._found[param][1]

    def numbered(self, tensors: Iterable[tuple[Tensor, str]]) -> dict[tuple[Tensor, str], int]:
        """Number original tensors: by their place in the model, where one was passed, else in the order given.

        Args:
            tensors: parameter of the optimizer, and the name of the tensor within it (empty where it is the only one).

        Returns:
            For each of them its number. The place in a model is that in which ``parameters()`` would have it had nobody
            wrapped it; what is not in the model comes after.
        """
        tensors = list(tensors)
        order = dict.fromkeys(self._in_model_order({param for param, _ in tensors}))
        order.update(dict.fromkeys(tensors))
        return {tensor: number for number, tensor in enumerate(order)}

    def _in_model_order(self, wanted: set[Tensor]) -> Iterator[tuple[Tensor, str]]:
        within: dict[str, list[tuple[Tensor, str]]] = {}  # by the module that had them
        for tensor in self._tensors:
            for original in tensor.originals:
                if original.param is None:
                    owner = original.name.rpartition(".")[0]
                    within.setdefault(owner, []).append((tensor.param, original.name))
        flat = {param for tensors in within.values() for param, _ in tensors}
        for path, module in self.model.named_modules() if self.model is not None else ():
            yield from within.pop(clean(path), ())
            for key, param in module.named_parameters(recurse=False):
                if param not in flat:
                    yield self._at((path, key), param, wanted), ""

    def _at(self, place: tuple[str, str], param: Tensor, wanted: set[Tensor]) -> Tensor:
        """The parameter at a place in the model; the one before, if that is wanted and this is not.

        From forward to backward FSDP2 has the whole of each there, of which the optimizer knows nothing.
        """
        before = self._places[place]() if place in self._places else None
        chosen = param if before is None or param in wanted or before not in wanted else before
        self._places[place] = ref(chosen)
        return chosen

    def describe(self, param: Tensor, label: str, cover_block: int | None) -> tuple[LocalShard, ...] | None:
        """One shard for each original tensor in ``param``; ``None`` where nobody flattened it.

        Raises:
            ValueError: if it was flattened, but the original shapes are not to be found in the model.
        """
        if param not in self._found:
            if not is_flattened(param):
                return None
            self.read()
        if param not in self._found:
            raise ValueError(self._how_to_pass_the_model(label))
        tensor, originals = self._found[param]
        return tuple(shard_of(tensor, original, cover_block) for original in originals)

    def check_sharded(self) -> None:
        """Raise unless every rank holds its part, and no more, of each flat tensor.

        Raises:
            RuntimeError: on every rank, if a wrapper has gathered a parameter that is to be updated.
        """
        for tensor in self._tensors:
            if tensor.gathered:
                raise RuntimeError(
                    f"{tensor.originals[0].name} and what was flattened with it is gathered at present "
                    f"({tensor.param.numel()} elements instead of the {tensor.part} of this rank), so that an update "
                    "would be lost. Call optimizer.step() outside of summon_full_params()."
                )

    def _how_to_pass_the_model(self, label: str) -> str:
        if self.model is None:
            return (
                f"{label} was flattened by FullyShardedDataParallel, so its original shape is not known here. "
                "Pass the wrapped root module: SM3(model.parameters(), model=model), or, if the model was wrapped "
                "after the optimizer was made, optimizer.attach(model)."
            )
        return (
            f"{label} was flattened by FullyShardedDataParallel, but is no parameter of the "
            f"{type(self.model).__name__} that was passed as model=. Pass the wrapped root module that it belongs to; "
            "if it was wrapped after the optimizer was made, call optimizer.attach(model) with the wrapped model."
        )


def shard_of(tensor: FlatTensor, original: Original, cover_block: int | None = None) -> LocalShard:
    """What this rank holds of one original tensor.

    Args:
        tensor: the flat tensor.
        original: one of those in it.
        cover_block: indices per block of the covers, ``None`` for whole slices.

    Raises:
        NotImplementedError: if the original is itself part of a larger tensor.
    """
    if original.extension:
        raise NotImplementedError(
            f"{original.name} is itself the shard of a DTensor, flattened by {tensor.wrapper}. Combine tensor "
            "parallelism with FSDP2 (torch.distributed.fsdp.fully_shard) instead."
        )
    shape, separate = _shape(original), original.param is not None
    if tensor.peers is None and separate:
        return LocalShard(shape, (Box.whole(shape),), cover_block=cover_block)
    ranks = tensor.peers.ranks if tensor.peers is not None else ()
    boxes = _boxes(tensor, original, tensor.rank)
    everywhere = [held(original, tensor.part, rank) for rank in _holders(tensor, original)]
    cut = tensor.peers if len(everywhere) > 1 else None
    return LocalShard(
        shape,
        boxes,
        flat_start=0 if separate else max(0, original.start - tensor.rank * tensor.part),
        flat_numel=sum(box.numel for box in boxes) if separate else tensor.part,
        order=original.order,
        shared=shared_entries(shape, everywhere, cut, cover_block, original.order) if cut is not None else (),
        ranks=ranks,
        layout=f"at {original.start} of a flat tensor in parts of {tensor.part} over ranks {in_words(ranks)}",
        name="" if separate else original.name,
        cover_block=cover_block,
        holders=cut,
        listeners=tensor.peers,  # any of them may be the one that saves scalars
        holdings=Holdings(tensor.peers, partial(_holdings, tensor, original)) if tensor.peers is not None else None,
    )


def _holdings(tensor: FlatTensor, original: Original) -> dict[int, tuple[Box, ...]]:
    """What each rank holds of an original tensor."""
    assert tensor.peers is not None
    return {rank: _boxes(tensor, original, number) for number, rank in enumerate(tensor.peers.ranks)}


def _boxes(tensor: FlatTensor, original: Original, number: int) -> tuple[Box, ...]:
    """What a part of a flat tensor holds of an original tensor."""
    shape = _shape(original)
    order = original.order or range(len(shape))
    boxes = flat_boxes([shape[d] for d in order], *held(original, tensor.part, number))
    return tuple(reordered(box, order) for box in boxes)


def _shape(original: Original) -> tuple[int, ...]:
    """A scalar counts as a vector."""
    return original.shape or (1,)


def _holders(tensor: FlatTensor, original: Original) -> range:
    """The numbers of the parts in which an original tensor lies."""
    if original.numel == 0:
        return range(0)
    return range(original.start // tensor.part, (original.start + original.numel - 1) // tensor.part + 1)
