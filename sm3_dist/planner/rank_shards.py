"""What each rank will hold of each parameter under a wrapper, reckoned before there is any.

Parameters that are alike and cut alike are reckoned once, and all ranks at once: a model of a hundred equal blocks on
thousands of ranks takes as long as one block.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from sm3_dist.layout.cover import Cell, accumulator_count, cell
from sm3_dist.layout.flat_metadata import Original
from sm3_dist.layout.zero import Partition
from sm3_dist.matrices import with_matrices
from sm3_dist.planner.flat_parts import FlatParts
from sm3_dist.planner.rectangles import Rectangles, rectangles
from sm3_dist.planner.sharding import Sharding

T = TypeVar("T", bound=Hashable)

_ALIGNED = 16
"""Bytes at whose multiples FSDP1 lets each tensor begin (with ``use_orig_params=True``)."""


@dataclass(frozen=True)
class Kind:
    """All that bytes depend on of a parameter.

    Attributes:
        shape: at least one-dimensional.
        dtype: its type.
        trained: whether it requires a gradient.
        hidden: whether it is a matrix (or a stack of them) between others, and no embedding and no head.
        matrix: whether :class:`sm3_dist.MuonLikeSM3` makes its update orthogonal.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool
    hidden: bool = False
    matrix: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def cells(self, cover_block: int | None) -> list[Cell]:
        """Those of each accumulator."""
        return [cell(self.shape, i, cover_block) for i in range(accumulator_count(self.shape, cover_block))]


@dataclass(frozen=True)
class Holding:
    """What every rank updates of a parameter, or of some that are alike.

    Attributes:
        kind: the parameter's.
        part: what the ranks update.
        times: how many there are.
        counted: whether the optimizer counts its steps; not for all but one of the tensors in a flat parameter.
        padding: for each rank the elements of a flat parameter beside those of its tensors.
    """

    kind: Kind
    part: Rectangles | FlatParts
    times: int = 1
    counted: bool = True
    padding: Tensor | int = 0

    @property
    def numel(self) -> Tensor:
        """Elements of each rank, with padding."""
        return self.part.numel() + self.padding

    @property
    def cut(self) -> bool:
        """Whether no rank has all of it."""
        return int(self.part.numel().max()) < self.kind.numel


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered and whose gradients are reduced together.

    Attributes:
        holdings: of the parameters.
        times: how many such units there are.
    """

    holdings: tuple[Holding, ...]
    times: int = 1


def rank_shards(sharding: Sharding, matrices_first: bool = False) -> list[Unit]:
    """The parameters of a model with what every rank of a copy updates of them.

    Args:
        sharding: the model, and how the ranks share it.
        matrices_first: whether the optimizer has the matrices in a param group before the others, as
            :class:`sm3_dist.MuonLikeSM3` does.

    Raises:
        ValueError: if a module that is flattened has parameters of several types.
    """
    module, mesh, kinds = sharding.module, sharding.mesh, kinds_of(sharding.module)
    if sharding.wrapper == "zero1":
        params = sorted(module.parameters(), key=lambda param: matrices_first and not kinds[param].matrix)
        return [Unit(tuple(holding for _, holding in _ranges(params, kinds, mesh[0])))]
    if sharding.flat:
        grouped = Counter(tuple(kinds[param] for param in params) for params in _by_unit(sharding))
        separate = sharding.wrapper == "fsdp1"
        return [Unit(tuple(_flat(alike, mesh[0], separate)), times) for alike, times in grouped.items()]
    cuts = {param: sharding.cuts(name) for name, param in module.named_parameters()}
    together = _by_unit(sharding) if sharding.by_rows else [[param] for param in module.parameters()]
    alike = _counted(_counted((kinds[param], cuts[param]) for param in params) for params in together)
    return [Unit(tuple(_cut(unit, mesh)), times) for unit, times in alike]


def each_shard(sharding: Sharding) -> Iterator[tuple[str, Rectangles | FlatParts]]:
    """As :func:`rank_shards`, but parameter by parameter: its name, and what every rank updates of it."""
    module, mesh, kinds = sharding.module, sharding.mesh, kinds_of(sharding.module)
    names = {param: name for name, param in module.named_parameters()}
    if sharding.wrapper == "zero1":
        yield from ((names[param], each.part) for param, each in _ranges(list(module.parameters()), kinds, mesh[0]))
    elif sharding.flat:
        for params in _by_unit(sharding):
            held = [each.part for each in _flat([kinds[p] for p in params], mesh[0], sharding.wrapper == "fsdp1")]
            yield from zip(map(names.__getitem__, params), held, strict=True)
    else:
        for params in _by_unit(sharding) if sharding.by_rows else [list(module.parameters())]:
            for param in params:
                yield names[param], rectangles(kinds[param].shape, mesh, sharding.cuts(names[param]))


def _cut(unit: Iterable[tuple[tuple[Kind, tuple[int | None, ...]], int]], mesh: tuple[int, int]) -> Iterator[Holding]:
    for (kind, cuts), times in unit:
        yield Holding(kind, rectangles(kind.shape, mesh, cuts), times)


def _counted(some: Iterable[T]) -> tuple[tuple[T, int], ...]:
    """What there is, and how often."""
    return tuple(Counter(some).items())


def kinds_of(module: nn.Module) -> dict[nn.Parameter, Kind]:
    """The kind of each parameter."""
    outer = {param for each in module.modules() if isinstance(each, nn.Embedding) for param in each.parameters()}
    outer |= {param for name, param in module.named_parameters() if name.rpartition(".")[0].endswith("head")}
    groups = with_matrices(module.parameters(), module)
    matrices = {param for group in groups if group["orthogonalize"] is True for param in group["params"]}
    return {
        param: Kind(
            tuple(param.shape) or (1,),
            param.dtype,
            param.requires_grad,
            hidden=param.dim() > 1 and param not in outer,
            matrix=param in matrices,
        )
        for param in module.parameters()
    }


def _ranges(
    params: Sequence[nn.Parameter], kinds: Mapping[nn.Parameter, Kind], ranks: int
) -> Iterator[tuple[nn.Parameter, Holding]]:
    """Cut the concatenation of the parameters of each type as ``shard_over=`` does."""
    alike: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for param in params:
        if param.requires_grad:
            alike.setdefault((param.dtype, param.device), []).append(param)
        else:
            yield param, Holding(kinds[param], FlatParts(kinds[param].shape, ranks, 0, (0, 0)))
    for trained in alike.values():
        partition = Partition(trained, ranks)
        cuts = torch.tensor(partition.cuts, dtype=torch.int64, device="cpu")
        for param, start in zip(trained, partition.starts, strict=True):
            yield param, Holding(kinds[param], _between(kinds[param].shape, start, cuts))


def _flat(kinds: Sequence[Kind], ranks: int, separate: bool) -> Iterator[Holding]:
    """Lay parameters one after another, and cut that in equal parts.

    Args:
        kinds: of the parameters of one unit.
        ranks: how many parts.
        separate: whether the optimizer sees a parameter for each tensor (``use_orig_params=True``) or the flat one.
    """
    types = {kind.dtype for kind in kinds}
    if len(types) > 1:
        names = ", ".join(sorted(map(str, types)))
        raise ValueError(f"a module that is flattened has parameters of one type, but these have {names}")
    position, originals = 0, []
    for kind in kinds:
        if separate:  # torch lets each begin at a whole multiple
            position += -position % (_ALIGNED // kind.dtype.itemsize)
        originals.append(Original("", kind.shape, position))
        position += kind.numel
    length = -(-position // ranks)
    cuts = torch.arange(ranks + 1, dtype=torch.int64, device="cpu") * length
    parts = [_between(original.shape, original.start, cuts) for original in originals]
    for k, (kind, part) in enumerate(zip(kinds, parts, strict=True)):
        last, padding = k == len(kinds) - 1, torch.zeros(ranks, dtype=torch.int64, device="cpu")
        if last and not separate:
            padding = length - sum((each.numel() for each in parts), start=padding)
        yield Holding(kind, part, counted=separate or last, padding=padding)


def _between(shape: tuple[int, ...], start: int, cuts: Tensor) -> FlatParts:
    """The parts of a tensor that begins at ``start`` of what is cut at ``cuts``."""
    numel = math.prod(shape)
    inside = (cuts - start).clamp(0, numel)
    first = max(0, int((inside == 0).sum()) - 1)
    last = min(len(cuts) - 1, len(cuts) - int((inside == numel).sum()))
    return FlatParts(shape, len(cuts) - 1, first, tuple(inside[first : max(first, last) + 1].tolist()))


def _by_unit(sharding: Sharding) -> list[list[nn.Parameter]]:
    """The parameters that are wrapped together: those of each unit, innermost first, then what is left in the root."""
    seen: set[nn.Parameter] = set()
    module, wrapped = sharding.module, set(sharding.units)
    result = []
    inner = [each for each in reversed(list(module.modules())) if each in wrapped and each is not module]
    for unit in [*inner, module]:
        fresh = [param for param in unit.parameters() if param not in seen]
        seen.update(fresh)
        if fresh:
            result.append(fresh)
    return result
