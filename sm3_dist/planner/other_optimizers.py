"""What other optimizers hold, by formula: on each rank, of the parts that SM3 would have.

===========  ===========================================================================================================
adamw        two float32 moments of every element (torch.optim.AdamW)
adamw-8bit   two moments of a byte and a float32 scale for each 256 elements, float32 below 4096 (bitsandbytes)
flash-adamw  bfloat16 weights with a byte that makes them 24 bits wide, two moments of a byte and a float16 scale for
             each 32 elements, bfloat16 gradients (flashoptim, arXiv 2602.23349)
adam-mini    a float32 momentum; of embeddings and head a second moment of every element, otherwise of a tensor or head,
             which is not counted (adam-mini, arXiv 2406.16793)
muon         a float32 momentum of hidden matrices, AdamW for embeddings, head and vectors (KellerJordan/Muon)
adafactor    a float32 average of each row and each column that the rank holds some of; of vectors every element
===========  ===========================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sm3_dist.planner.planning import RankBytes
from sm3_dist.planner.rank_shards import Kind, rank_shards
from sm3_dist.planner.rectangles import product
from sm3_dist.planner.sharding import Sharding

_FLOAT = 4
_QUANTIZED, _SMALL = 256, 4096
_FLASH_GROUP = 32

State = Callable[[Tensor, Sequence[Tensor], Kind], Tensor]
"""Bytes of state: of the elements that each rank updates, of the lengths of the box around them, in a tensor."""


@dataclass(frozen=True)
class Baseline:
    """An optimizer to compare with.

    Attributes:
        state: its bytes of state.
        weight: bytes of a weight, and of its gradient.
    """

    state: State
    weight: int = _FLOAT


def _adamw(numel: Tensor, lengths: Sequence[Tensor], kind: Kind) -> Tensor:
    return 2 * _FLOAT * numel


def _adamw_8bit(numel: Tensor, lengths: Sequence[Tensor], kind: Kind) -> Tensor:
    if kind.numel < _SMALL:
        return _adamw(numel, lengths, kind)
    return 2 * (numel + _FLOAT * -(-numel // _QUANTIZED))


def _flash_adamw(numel: Tensor, lengths: Sequence[Tensor], kind: Kind) -> Tensor:
    return numel + 2 * (numel + 2 * -(-numel // _FLASH_GROUP))


def _adam_mini(numel: Tensor, lengths: Sequence[Tensor], kind: Kind) -> Tensor:
    outer = len(kind.shape) > 1 and not kind.hidden
    return (2 if outer else 1) * _FLOAT * numel


def _muon(numel: Tensor, lengths: Sequence[Tensor], kind: Kind) -> Tensor:
    return (1 if kind.hidden else 2) * _FLOAT * numel


def _adafactor(numel: Tensor, lengths: Sequence[Tensor], kind: Kind) -> Tensor:
    if len(lengths) < 2:
        return _FLOAT * numel
    *matrices, rows, columns = lengths
    averages = _FLOAT * (rows + columns) * (product(matrices) if matrices else 1)
    return torch.where(numel > 0, averages, 0)


BASELINES = {
    "adamw": Baseline(_adamw),
    "adamw-8bit": Baseline(_adamw_8bit),
    "flash-adamw": Baseline(_flash_adamw, weight=2),
    "adam-mini": Baseline(_adam_mini),
    "muon": Baseline(_muon),
    "adafactor": Baseline(_adafactor),
}
"""By name. Their sources stand above."""


def baseline(name: str, sharding: Sharding) -> list[RankBytes]:
    """What each rank holds with another optimizer, most of them with float32 weights as in mixed precision.

    Gradients are of the type of the weights. Not every one of these works under every wrapper: the bytes are those that
    it would hold if it did.

    Args:
        name: one of :data:`BASELINES`.
        sharding: the model, and how the ranks share it.

    Returns:
        for each rank its bytes; nothing is sent.

    Raises:
        ValueError: if a module that is flattened has parameters of several types.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     model = torch.nn.Linear(1024, 1024, bias=False)
        >>> {name: baseline(name, Sharding.of(model))[0].state for name in ("adamw", "adamw-8bit", "muon", "adafactor")}
        {'adamw': 8388608, 'adamw-8bit': 2129920, 'muon': 4194304, 'adafactor': 8192}
    """
    other = BASELINES[name]
    weights, gradients, state = torch.zeros((3, sharding.ranks), dtype=torch.int64, device="cpu")
    for unit in rank_shards(sharding):
        for holding in unit.holdings:
            kind, times, numel = holding.kind, holding.times * unit.times, holding.numel
            stored = other.weight * (torch.full_like(numel, kind.numel) if sharding.replicated else numel)
            weights += times * stored
            if kind.trained:
                gradients += times * stored
                state += times * other.state(numel, holding.part.lengths(), kind)
    nothing = torch.zeros_like(state)
    ranks = [RankBytes(*row) for row in torch.stack([weights, gradients, state, nothing, nothing], 1).tolist()]
    return ranks * sharding.copies
