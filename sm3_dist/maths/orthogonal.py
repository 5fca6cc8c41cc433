"""Orthogonalized updates: the nearest matrix whose singular values are all about 1 takes the update's place.

The sign of a matrix, in a word: ``U V^T`` for the update ``U S V^T``. An odd polynomial of a matrix is that polynomial
of its singular values, so a few products bring them all near 1, and no decomposition is needed. Products are in
bfloat16 and sums within them in float32; all is float32 on processors that are slow at bfloat16.

Sources: Jordan et al., "Muon", 2024, for momentum that is made orthogonal and for the polynomial; Liu et al., "Muon is
scalable for LLM training", 2025, arXiv 2502.16982, for the size of the update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.backends import mkldnn

from sm3_dist.layout.shard import LocalShard
from sm3_dist.maths.rounding import WEIGHT
from sm3_dist.maths.update import CHUNK_BYTES, Settings

TYPE = torch.bfloat16
"""Of what is made orthogonal, and of the result."""
COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 5
"""``x -> a x + b x^3 + c x^5``, one polynomial after another."""
RMS = 0.2
"""Root mean square of an orthogonalized update: what AdamW's usually is."""
LAUNCHED_BYTES = 1 << 26
"""Bytes that are moved at a time where no cache need hold them, and each operation is launched."""
ALIGNED = 8
"""Matrices in a batch begin at multiples of so many elements, as those alone do."""
SHORTEST = 1e-30
"""No update is shorter, lest nothing be divided by nothing."""


def orthogonalized(update: Tensor) -> Tensor:
    """Bring the singular values of a matrix to between about 0.7 and 1.2, those of 0 aside.

    Args:
        update: shape ``(n_1, …, n_k)``, ``k >= 2``, which counts as a matrix ``(n_1, n_2 … n_k)``; bfloat16.

    Returns:
        bfloat16, of the same shape. It depends on shape and values alone, and not on where they lie in memory.

    Example:
        >>> stretched = torch.diag(torch.tensor([1.0, 3.0, 0.2])).bfloat16()
        >>> values = torch.linalg.svdvals(orthogonalized(stretched).float())
        >>> bool((values > 0.6).all() and (values < 1.3).all())
        True
    """
    return _as_before(_polynomial(_prepared(update)), update)


def orthogonalized_together(updates: Sequence[Tensor]) -> list[Tensor]:
    """:func:`orthogonalized` of each; on a GPU those of one shape in products of batches.

    There the products of a matrix of a thousand rows take less time than their launches. A library of products may add
    up in another order for a batch, which is tried once for each shape and size of batch: bits do not depend on which
    matrices are worked on together.

    Args:
        updates: as for :func:`orthogonalized`, all on one device.
    """
    on_host = all(update.device.type == "cpu" for update in updates)  # where nothing is launched
    return [orthogonalized(update) for update in updates] if on_host else _in_batches(updates)


def _in_batches(updates: Sequence[Tensor]) -> list[Tensor]:
    prepared = [_prepared(update) for update in updates]
    alike: dict[tuple[int, ...], list[int]] = {}
    for k, x in enumerate(prepared):
        alike.setdefault(tuple(x.shape), []).append(k)
    results: list[Tensor] = [*prepared]
    for shape, these in alike.items():
        if len(these) > 1 and batch_is_exact(len(these), *shape, prepared[these[0]].device):
            batch = _polynomials([prepared[k] for k in these])
        else:
            batch = tuple(_polynomial(prepared[k]) for k in these)
        for k, x in zip(these, batch, strict=True):
            results[k] = _as_before(x, updates[k])
    return results


@cache
def batch_is_exact(count: int, rows: int, columns: int, device: torch.device) -> bool:
    """Whether a batch of so many matrices has the bits of each alone. It is tried, once: the host waits for that."""
    if columns % ALIGNED:  # where the next row begins, and the next matrix
        return False
    generator = torch.Generator(device).manual_seed(0)
    randn = partial(torch.randn, rows, columns, dtype=torch.float32, device=device, generator=generator)
    some = [_prepared(randn()) for _ in range(count)]
    return all(torch.equal(_polynomial(x), batched) for x, batched in zip(some, _polynomials(some), strict=True))


def _prepared(update: Tensor) -> Tensor:
    """The update as a matrix that is no taller than wide, of length 1, in the type of the products."""
    matrix = update.flatten(1)
    x = (matrix.mT if _is_tall(update) else matrix).contiguous()
    return _normalized(x.float()).to(product_type(x.device))


def _as_before(x: Tensor, update: Tensor) -> Tensor:
    return (x.mT if _is_tall(update) else x).reshape(update.shape).to(TYPE)


def _is_tall(update: Tensor) -> bool:
    return update.shape[0] > math.prod(update.shape[1:])


def _polynomial(x: Tensor) -> Tensor:
    """The odd polynomial of a matrix."""
    for a, b, c in COEFFICIENTS:
        x = _fifth_power(x, a, b, c)
    return x


def _polynomials(matrices: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The odd polynomial of each, in one batch. It is made here: Python 3.10 holds arguments until a call is over."""
    batch = torch.stack(tuple(matrices))
    for a, b, c in COEFFICIENTS:
        batch = _fifth_power(batch, a, b, c)
    return batch.unbind()


def _fifth_power(x: Tensor, a: float, b: float, c: float) -> Tensor:
    """``a x + b x^3 + c x^5`` of a matrix, or of each in a batch."""
    added = torch.addmm if x.dim() == 2 else torch.baddbmm
    gram = x @ x.mT
    return added(x, added(gram, gram, gram, beta=b, alpha=c), x, beta=a)


def _normalized(x: Tensor) -> Tensor:
    return x.div_(torch.linalg.vector_norm(x).clamp_(min=SHORTEST))


def product_type(device: torch.device) -> torch.dtype:
    """The type of the factors on a device: bfloat16, or float32 on a processor that has no instructions for it.

    There it takes eight times as long as float32.
    """
    slow = device.type == "cpu" and not (mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.float32 if slow else torch.bfloat16


def length(shape: Sequence[int]) -> float:
    """What an orthogonal matrix is multiplied with to have a root mean square of ``RMS``: that of 1 is short.

    Example:
        >>> round(length((100, 4, 5)), 6)
        2.0
    """
    return RMS * math.sqrt(max(shape[0], math.prod(shape[1:])))


def work(shape: Sequence[int]) -> int:
    """Multiplications of one product with a matrix of this shape; what makes owners' shares even."""
    rows, columns = shape[0], math.prod(shape[1:])
    return rows * columns * min(rows, columns)


def move_along(shard: LocalShard, weight: Tensor, directions: Sequence[Tensor], settings: Settings) -> None:
    """Move weights along an orthogonalized update: ``w <- (1 - lr * weight_decay) w - lr * length * direction``.

    Args:
        shard: the boxes.
        weight: the local tensor; updated in place.
        directions: for each box what of the orthogonalized update it has, bfloat16.
        settings: the hyperparameters: ``lr``, ``weight_decay`` and ``rounding``.
    """
    s, size = settings, length(shard.shape)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    most = (CHUNK_BYTES if weight.device.type == "cpu" else LAUNCHED_BYTES) // dtype.itemsize
    for box, part, direction in zip(shard.boxes, shard.views(weight), directions, strict=True):
        for chunk in box.chunks(most):
            at = chunk.within(box)
            wide = part[at].to(dtype)
            if s.weight_decay:
                wide.mul_(1 - s.lr * s.weight_decay)
            wide.sub_(direction[at].to(dtype).mul_(size).mul_(s.lr))
            if s.rounding is not None:
                s.rounding.noise(chunk, part.device).store(part[at], wide, WEIGHT)
            elif part.dtype != dtype:
                part[at] = wide
