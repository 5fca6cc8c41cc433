"""Momentum in one byte per element: a table of 255 values, the same for every element, tensor and step.

Other optimizers cut their state into blocks and keep the largest value of each as its scale, for the state may be of
any size. That of SM3 is not: momentum is an average of updates, whose root mean square ``update_rms`` holds. Without it
none is longer than 1 (``beta = 0``) or ``1 / sqrt(1 - beta)``. So a small floating-point number does, with a sign, 3
bits of exponent and 4 of mantissa (E3M4), and there are no scales to find, to store, or to agree on where a shard ends
within a block.

Code ``c >= 0`` stands for

    ``c * 2^-10``  for ``c < 16``,  ``(16 + c % 16) * 2^(c // 16 - 11)``  up to 127, which is 1.9375,

and ``-c`` for the negative of that; -128 is NaN. Values are rounded to a neighbour at random, with probabilities that
make them right on average: to the nearest, what a step adds to the momentum would mostly be lost. Longer momentum than
1.9375 is cut off, which with updates of a root mean square of 1 hardly any is.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MOMENTUM_BUFFER, MOMENTUM_CODE = "momentum_buffer", "momentum_e3m4"
"""Key of the momentum in the state of a parameter. Codes have one of their own, lest they be taken for values."""
OLD_CODE = "momentum_code"
"""Key of codes of another table, which were there before."""
NEAREST = 1 << 15
"""Noise that rounds to the nearest."""

LONGEST = 1.9375
"""Longer momentum is cut off."""

_NAN = -128
_LONGEST = 127
_NORMAL = 2.0**-6
"""From here on the distance between neighbours grows with the values."""
_DROPPED = 19
"""Bits of float32's mantissa beyond those that a code has."""
_BIAS = (127 - 6 << 4) - 16
"""What the upper bits of a float32, exponent and 4 bits of mantissa, have more than a code."""


def momentum_key(dtype: torch.dtype) -> str:
    """Key of a momentum of this type in the state of its parameter."""
    return MOMENTUM_CODE if dtype == torch.int8 else MOMENTUM_BUFFER


def refusal_of_old_codes(whose: str) -> str:
    """What to say where :data:`OLD_CODE` is in a state that is to be loaded."""
    return (
        f"the loaded state of {whose} has {OLD_CODE}, momentum in 8 bits with 3 of mantissa, as sm3_dist had it once. "
        f"Now it has 4, and the key {MOMENTUM_CODE}. Put zeros in its place, state[{MOMENTUM_CODE!r}] = "
        f"torch.zeros_like(state.pop({OLD_CODE!r})), or, to read a checkpoint without it, use torch.distributed."
        "checkpoint.load with planner=DefaultLoadPlanner(allow_partial_load=True). Momentum then starts at 0 again, "
        "which is made up for after some ten steps."
    )


def encode(values: Tensor, noise: Tensor | int = NEAREST) -> Tensor:
    """Codes of values: of the two neighbours of a value the longer one, if the noise carries over.

    With ``low`` and ``high`` the neighbours, that is if ``floor(2^16 (|x| - low) / (high - low)) + noise >= 2^16``.

    Args:
        values: float32 or float64 (which is first rounded to the nearest float32).
        noise: integers in ``[0, 2^16)``, int32, of the shape of the values.

    Returns:
        int8, of the same shape.

    Example:
        >>> encode(torch.tensor([0.0, 1.0, -1.9375, 100.0, float("nan")]))
        tensor([   0,  112, -127,  127, -128], dtype=torch.int8)
        >>> value = torch.tensor(1 + 1 / 64)  # a quarter of the way from 1 to 1 + 1 / 16
        >>> [decode(encode(value, n)).item() for n in (0, 49151, 49152)]
        [1.0, 1.0, 1.0625]
    """
    values = values.float()
    length = values.abs()
    # Codes with 19 bits after the point: below 2^-6 by arithmetic, from there on the bits of a float32 are just that.
    fixed = (length.clamp(max=_NORMAL) * 2.0**26).int() << 3
    code = torch.where(length < _NORMAL, fixed, length.view(torch.int32) - (_BIAS << _DROPPED))
    code = code.add_(noise, alpha=1 << _DROPPED - 16).bitwise_right_shift_(_DROPPED).clamp_(max=_LONGEST)
    sign = values.view(torch.int32) >> 31
    return code.bitwise_xor_(sign).sub_(sign).masked_fill_(values.isnan(), _NAN).to(torch.int8)


def decode(codes: Tensor) -> Tensor:
    """Values of codes.

    Args:
        codes: int8.

    Returns:
        float32, of the same shape; exact.

    Example:
        >>> decode(torch.tensor([0, 1, 112, -127], dtype=torch.int8)).tolist()
        [0.0, 0.0009765625, 1.0, -1.9375]
    """
    places = codes.view(torch.uint8).flatten().int()  # -1 is the last
    return _table(codes.device).index_select(0, places).view(codes.shape)


@functools.cache
def _table(device: torch.device) -> Tensor:
    """The values of the codes from 0 to 127, and of those from -128 to -1."""
    codes = torch.arange(128, dtype=torch.int32, device="cpu")
    values = torch.where(codes < 16, codes * 2.0**-10, (codes + _BIAS << _DROPPED).view(torch.float32))
    nan = values.new_tensor([torch.nan])
    return torch.cat([values, nan, -values[1:].flip(0)]).to(device)


def converted(momentum: Tensor, dtype: torch.dtype) -> Tensor:
    """Momentum in another type, from codes or to codes too; rounded to the nearest.

    Example:
        >>> converted(torch.tensor([1.05, -0.25]), torch.int8)
        tensor([113, -80], dtype=torch.int8)
        >>> converted(torch.tensor([112, -80], dtype=torch.int8), torch.bfloat16)
        tensor([ 1.0000, -0.2500], dtype=torch.bfloat16)
    """
    if momentum.dtype == dtype:
        return momentum
    values = decode(momentum) if momentum.dtype == torch.int8 else momentum
    return encode(values) if dtype == torch.int8 else values.to(dtype)
