"""Baselines: bits per byte of the held-out text under methods that everybody knows."""

from __future__ import annotations

import bz2

import torch
from torch import Tensor

START = 0.1  # every count starts here, so that nothing unseen is impossible


def all_of(train: Tensor, held_out: Tensor) -> dict[str, float]:
    """Return every baseline by name: bits per byte of ``held_out``."""
    return {
        "order-0 entropy": order_0(train, held_out),
        "order-1 (bigram)": order_1(train, held_out),
        "bz2": bz2_bits(held_out),
    }


def order_0(train: Tensor, held_out: Tensor) -> float:
    """Cross-entropy, in bits per byte, of a model that knows how frequent each byte is.

    Args:
        train: uint8, 1-D: the bytes that are counted.
        held_out: uint8, 1-D: the bytes that are predicted, all but the first (which :func:`order_1` cannot).

    Example:
        >>> text = torch.tensor([0, 1, 2, 3] * 4000, dtype=torch.uint8)
        >>> round(order_0(text, text), 1)  # four bytes, equally frequent
        2.0
    """
    counts = torch.bincount(train.int(), minlength=256) + START
    return mean_bits(counts, held_out[1:].long())


def order_1(train: Tensor, held_out: Tensor) -> float:
    """Cross-entropy, in bits per byte, of a model that knows how frequent each byte is after each other (bigrams).

    Example:
        >>> text = torch.tensor([0, 1, 2, 3] * 4000, dtype=torch.uint8)
        >>> round(order_1(text, text), 1)  # each byte follows from the one before
        0.0
    """
    counts = torch.bincount(pairs(train), minlength=256 * 256).view(256, 256) + START
    return mean_bits(counts, pairs(held_out))


def bz2_bits(held_out: Tensor) -> float:
    """Bits per byte that ``bz2`` needs for the held-out bytes. It sees them alone, but up to 900,000 at a time.

    Example:
        >>> round(bz2_bits(torch.zeros(100_000, dtype=torch.uint8)), 2)
        0.0
    """
    return 8 * len(bz2.compress(held_out.numpy().tobytes())) / len(held_out)


def pairs(text: Tensor) -> Tensor:
    """Each byte with the one before it, as ``256 * before + byte``."""
    return 256 * text[:-1].int() + text[1:].int()


def mean_bits(counts: Tensor, symbols: Tensor) -> float:
    """Mean of ``-log2`` of the share of each symbol in its row of ``counts``."""
    bits = -(counts / counts.sum(-1, keepdim=True)).log2()
    return bits.flatten()[symbols].mean(dtype=torch.float64).item()
