"""What a wrapper lets a rank send in one step, by formula.

With ring algorithms, over ``W`` ranks, each rank sends ``(W - 1) / W`` of all bytes in an all-gather or a
reduce-scatter, and twice that in an all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable


def ring(ranks: int) -> float:
    """The share of all bytes that a rank sends in an all-gather or a reduce-scatter.

    Example:
        >>> ring(4), ring(1)
        (0.75, 0.0)
    """
    return (ranks - 1) / ranks


def _ddp(weights: int, gradients: int, ranks: int, replicas: int) -> float:
    """All-reduce of the gradients."""
    return 2 * ring(ranks) * gradients


def _zero1(weights: int, gradients: int, ranks: int, replicas: int) -> float:
    """And an all-gather of what was updated."""
    return _ddp(weights, gradients, ranks, replicas) + ring(ranks) * gradients


def _sharded(weights: int, gradients: int, ranks: int, replicas: int) -> float:
    """All-gathers of the weights in forward and, resharded in between, in backward; reduce-scatter of the gradients."""
    return ring(ranks) * (2 * weights + gradients)


def _hsdp(weights: int, gradients: int, ranks: int, replicas: int) -> float:
    """That within a replica, and an all-reduce of its part of the gradients over the replicas."""
    shards = ranks // replicas
    return _sharded(weights, gradients, shards, 1) + 2 * ring(replicas) * gradients / shards


SENT: dict[str, Callable[[int, int, int, int], float] | None] = {
    "none": lambda *_: 0.0,
    "ddp": _ddp,
    "zero1": _zero1,
    "fsdp2": _sharded,
    "hsdp": _hsdp,
    "fsdp1": _sharded,
    "fairscale": _sharded,
    "tp": None,  # activations, which depend on the batch
}
"""Of the bytes of all weights, of the gradients, the number of ranks and that of replicas."""
