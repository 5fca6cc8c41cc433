"""Stochastic rounding to bfloat16 and to 8 bits, from random numbers that belong to an element of the original tensor.

A float32 value lies between two neighbours in bfloat16. Rounded to the nearest, an update of less than half their
distance is lost, in every step anew. Rounded up with a probability that is the fraction of the way to the upper one, it
arrives on average, and no float32 copy of the weights is needed.

The numbers come from a counter: Philox4x32-7 of (seed, step, tensor, position in the original tensor). There is no
state to keep, save or hand round, and whoever holds an element, in whatever piece of whatever size, rounds it alike.

Seven rounds are the fewest that pass BigCrush, which takes far more of a generator than a coin for each element. (Its
authors' library has 10 by default, and says of 7 that some much longer tests gave p-values of 1e-7, and still longer
ones did not.)

Sources: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, for the generator;
Zamirai et al., "Revisiting BFloat16 Training", 2020, arXiv 2010.06192, for what stochastic rounding does to training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from sm3_dist.layout.box import Box, place
from sm3_dist.layout.cover import split
from sm3_dist.maths.momentum_code import encode

WEIGHT, MOMENTUM = 0, 1
"""What is rounded: the two of an element take the two halves of one word."""
LANES = 8
"""Elements that one call of the generator serves: 128 bits, 16 for each."""

_WORD = (1 << 32) - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7

Word = TypeVar("Word", int, Tensor)


def philox(counter: Sequence[Word | int], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-7: four random words of 32 bits.

    Args:
        counter: four words, integers or int64 tensors that broadcast; values in ``[0, 2^32)``.
        key: two words.

    Example:
        >>> [hex(word) for word in philox((0, 0, 0, 0), (0, 0))]
        ['0x5f6fb709', '0xd893f64', '0x4f121f81', '0x4f730a48']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # 64-bit products. In int64 they wrap round to negative ones; the mask after the shift drops the sign again.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3  # type: ignore[return-value]


@dataclass(frozen=True)
class Rounding:
    """How one tensor is rounded in one step.

    A tensor of any number of dimensions counts as a matrix, see :func:`~sm3_dist.layout.cover.split`: an element lies
    in row ``r``, its place in the first dimensions in row-major order, and column ``c``, its place in the others. Of
    ``philox((c // 8, r, number, step), seed)``, eight numbers of 16 bits, the lower half of each word first, its weight
    takes the one at ``c % 8``, and its momentum the one at ``(c % 8) ^ 1``, the other half of the same word. Words are
    taken modulo ``2^32``.

    Attributes:
        seed: 64 bits.
        step: number of steps that the tensor has taken before; of a tensor on a GPU it may be a tensor there, int64.
        number: tells the tensors of an optimizer apart.
        shape: shape of the original tensor.
        bfloat16: whether bfloat16 is rounded so; 8-bit momentum always is.
    """

    seed: int
    step: int | Tensor
    number: int
    shape: tuple[int, ...]
    bfloat16: bool = True

    def noise(self, box: Box, device: torch.device | str = "cpu") -> Noise:
        """The random numbers of the elements of a box.

        Example:
            What a part of the tensor gets does not depend on the part:

            >>> rounding = Rounding(seed=1, step=0, number=0, shape=(4, 20))
            >>> whole, part = Box.whole((4, 20)), Box((1, 3), (3, 17))
            >>> torch.equal(rounding.noise(whole)[MOMENTUM][part.within(whole)], rounding.noise(part)[MOMENTUM])
            True
        """
        return Noise(self, box, device)


class Noise:
    """Random numbers of the elements of a box: integers in ``[0, 2^16)``, int32, of the shape of the box.

    ``noise[WEIGHT]`` and ``noise[MOMENTUM]`` come from the same words, which are made when one is asked for.

    Args:
        rounding: of the tensor.
        box: the elements.
        device: where to make them.
    """

    def __init__(self, rounding: Rounding, box: Box, device: torch.device | str) -> None:
        self._rounding, self._box, self._device = rounding, box, device

    def __getitem__(self, what: int) -> Tensor:
        halves, columns = self._made
        return halves.index_select(1, columns ^ what).view(self._box.shape)

    @cached_property
    def _made(self) -> tuple[Tensor, Tensor]:
        """What each row gets of the generator, in halves of words, and which of them each column's weight takes."""
        r, box, device = self._rounding, self._box, self._device
        s = split(r.shape)
        rows = _places(r.shape[:s], box.start[:s], box.stop[:s], device)
        columns = _places(r.shape[s:], box.start[s:], box.stop[s:], device)
        first, last = (place(at[s:], r.shape[s:]) // LANES for at in (box.start, [b - 1 for b in box.stop]))
        groups = torch.arange(first, last + 1, dtype=torch.int64, device=device)
        counter = (groups & _WORD, rows.view(-1, 1) & _WORD, r.number & _WORD, r.step & _WORD)
        words = philox(counter, (r.seed & _WORD, r.seed >> 32 & _WORD))
        halves = torch.stack([half.int() for word in words for half in (word & 0xFFFF, word >> 16)], -1).flatten(1)
        return halves, columns - first * LANES

    def store(self, target: Tensor, values: Tensor, what: int) -> None:
        """Write values into a tensor: rounded stochastically to codes and to bfloat16, else to the nearest.

        Args:
            target: of the shape of the box; int8 for codes of momentum.
            values: the same shape, float32 or float64 (which is first rounded to the nearest float32).
            what: ``WEIGHT`` or ``MOMENTUM``.
        """
        if target.dtype == torch.int8:
            values = encode(values, self[what])
        elif target.dtype == torch.bfloat16 and self._rounding.bfloat16:
            values = round_to_bfloat16(values, self[what])
        target.copy_(values)


def _places(shape: Sequence[int], start: Sequence[int], stop: Sequence[int], device: torch.device | str) -> Tensor:
    """The places of a box's indices in a tensor of this shape, in row-major order."""
    places = torch.zeros((), dtype=torch.int64, device=device)
    for n, a, b in zip(shape, start, stop, strict=True):
        places = (places * n).unsqueeze(-1) + torch.arange(a, b, dtype=torch.int64, device=device)
    return places.flatten()


def round_to_bfloat16(values: Tensor, noise: Tensor) -> Tensor:
    """Round to bfloat16, away from zero if the noise, added to the 16 bits that are dropped, carries over.

    With noise uniform in ``[0, 2^16)`` the expectation of the result is the value. Infinities and NaN stay, and what is
    between the largest finite value and the next one that would be may become infinite.

    Args:
        values: float32 or float64.
        noise: int32, the same shape.

    Returns:
        float32, with values that bfloat16 can represent.

    Example:
        >>> value = torch.tensor(1 + 1 / 512)  # a quarter of the way from 1 to 1 + 1 / 128
        >>> [round_to_bfloat16(value, torch.tensor(n, dtype=torch.int32)).item() for n in (0, 49151, 49152)]
        [1.0, 1.0, 1.0078125]
    """
    values = values.float()
    bits = values.view(torch.int32)
    return torch.where(values.isnan(), values, (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32))
