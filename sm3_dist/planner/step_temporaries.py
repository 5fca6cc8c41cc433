"""What a step takes for itself on a GPU, by formula: memory beside weights, gradients and state, and free after it.

==============  ========================================================================================================
SM3             nothing: kernels update where the tensors are
sm3-muon-like   at most three buckets of updates on their way, there and back, and 10 bytes for each element of the one
                that is made orthogonal, 12 where it came from several ranks (docs/orthogonal.md)
adamw           as PyTorch makes it by default: the root of the second moment, float32, of all elements at once
                (torch/optim/adam.py, ``_multi_tensor_adam``); DTensors are taken one after another, two copies of each
                and one that is left of the tensor before (``_single_tensor_adam``). Nothing with ``fused=True``
adamw-8bit      nothing: a kernel in place (bitsandbytes/optim/optimizer.py, ``update_step``)
flash-adamw     nothing: a kernel in place (flashoptim; measured)
adam-mini       two float32 copies of the largest tensor (adam_mini/adam_mini.py, ``step``)
muon            for the largest matrix 8 bytes per element, and 4 per element of its Gram matrix (torch/optim/_muon.py,
                ``_zeropower_via_newtonschulz``; KellerJordan/Muon takes as much), or AdamW's for the rest
adafactor       a float32 copy of the largest tensor and what is left of the one before it (torch/optim/_adafactor.py,
                ``_single_tensor_adafactor``, the default)
==============  ========================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sm3_dist.maths.orthogonal import TYPE
from sm3_dist.planner.exchange_buffers import ALIVE
from sm3_dist.planner.rank_shards import Kind, each_shard, kinds_of
from sm3_dist.planner.sharding import Sharding
from sm3_dist.ranks.matrix_exchange import BUCKET_BYTES

_FLOAT, _HALF = 4, 2
_ORTHOGONAL, _PUT_TOGETHER = 10, 2
_DTENSORS = ("fsdp2", "hsdp", "tp")


@dataclass(frozen=True)
class Held:
    """A tensor that is trained.

    Attributes:
        kind: its kind.
        numel: of how many of its elements each rank takes the step.
    """

    kind: Kind
    numel: Tensor

    @property
    def whole_matrix(self) -> int:
        """Bytes that Muon takes for it on the rank that makes it orthogonal."""
        *stack, rows, columns = self.kind.shape
        return 4 * _HALF * self.kind.numel + 2 * _HALF * math.prod(stack) * min(rows, columns) ** 2


Formula = Callable[[Sequence[Held], str], Tensor]
"""Bytes on each rank: of the tensors in the order of the optimizer, and of the wrapper."""


def _nothing(held: Sequence[Held], wrapper: str) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device="cpu")


def _one_by_one(held: Sequence[Held], now: int, before: int) -> Tensor:
    """So many bytes per element of a tensor, and of the one before."""
    most = last = _nothing(held, "")
    for each in held:
        most = torch.maximum(most, now * each.numel + before * last)
        last = each.numel
    return most


def _adamw(held: Sequence[Held], wrapper: str) -> Tensor:
    if wrapper in _DTENSORS:
        return _one_by_one(held, 2 * _FLOAT, _FLOAT)
    return _FLOAT * sum((each.numel for each in held), start=_nothing(held, wrapper))


def _adam_mini(held: Sequence[Held], wrapper: str) -> Tensor:
    return _one_by_one(held, 2 * _FLOAT, 0)


def _muon(held: Sequence[Held], wrapper: str) -> Tensor:
    largest = max((each.whole_matrix for each in held if each.kind.hidden), default=0)
    return _adamw([each for each in held if not each.kind.hidden], wrapper).clamp(min=largest)


def _adafactor(held: Sequence[Held], wrapper: str) -> Tensor:
    return _one_by_one(held, _FLOAT, _FLOAT)


def _muon_like(held: Sequence[Held], wrapper: str) -> Tensor:
    matrices = [each for each in held if each.kind.matrix]
    bucket = max([BUCKET_BYTES // TYPE.itemsize, *(each.kind.numel for each in matrices)])
    total = sum(each.kind.numel for each in matrices)
    cut = sum(each.kind.numel for each in matrices if int(each.numel.max()) < each.kind.numel)
    given = sum((each.numel for each in matrices), start=_nothing(held, wrapper)).clamp(max=ALIVE * bucket)
    received = min(ALIVE * bucket, cut)
    work = (_ORTHOGONAL + _PUT_TOGETHER * (cut > 0)) * min(bucket, total)
    return TYPE.itemsize * (given + received) + work


FORMULAS: dict[str, Formula] = {
    "sm3-muon-like": _muon_like,
    "adamw": _adamw,
    "adam-mini": _adam_mini,
    "muon": _muon,
    "adafactor": _adafactor,
}
"""By name, of those that take something. Their sources stand above."""


def step_temporaries(sharding: Sharding) -> dict[str, int]:
    """The most bytes that a rank takes for itself in a step on a GPU, for each optimizer that takes any.

    Args:
        sharding: the model, and how the ranks share it.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     model = torch.nn.Linear(1024, 1024, bias=False)
        >>> takes = step_temporaries(Sharding.of(model))
        >>> takes["adamw"], takes["muon"], takes["adafactor"]
        (4194304, 12582912, 4194304)
    """
    module, parts = sharding.module, dict(each_shard(sharding))
    kinds = kinds_of(module)
    held = [Held(kinds[param], parts[name].numel()) for name, param in module.named_parameters() if param.requires_grad]
    return {name: int(formula(held, sharding.wrapper).max()) for name, formula in FORMULAS.items()}
