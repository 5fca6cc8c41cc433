"""SM3-II on whole tensors in the plainest PyTorch: the specification, and what the tests hold every layout against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sm3_dist.shard import accumulator_dtype


@dataclass
class ReferenceState:
    """State of one tensor of shape ``(n_1, …, n_k)``.

    Attributes:
        accumulators: ``mu_i`` of shape ``(n_i,)`` for each dimension; the tensor's own shape for ``k <= 1``.
        momentum_buffer: the tensor's shape; zero at first.
    """

    accumulators: list[Tensor]
    momentum_buffer: Tensor

    @classmethod
    def zeros(cls, weight: Tensor) -> ReferenceState:
        """The state before the first step, in float32 (float64 for float64 weights)."""
        dtype = accumulator_dtype(weight.dtype)
        shapes: list[tuple[int, ...]] = [(n,) for n in weight.shape] or [()]
        return cls([torch.zeros(s, dtype=dtype) for s in shapes], torch.zeros(weight.shape, dtype=dtype))


def reference_step(
    weight: Tensor,
    grad: Tensor,
    state: ReferenceState,
    *,
    lr: float = 0.1,
    momentum: float = 0.0,
    beta: float = 0.0,
    eps: float = 1e-30,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """One step of SM3-II, with whole-tensor temporaries and no care for speed; each line rounds as written.

    Args:
        weight: shape ``(n_1, …, n_k)``; updated in place.
        grad: the same shape.
        state: updated in place.
        lr: learning rate.
        momentum: coefficient of the moving average of updates; 0 for none.
        beta: coefficient of the moving average of squared gradients; 0 for sums.
        eps: added under the square root.
        weight_decay: decoupled weight decay.
        maximize: follow the gradient up.

    Source: arXiv 1901.11150, algorithm SM3-II.

    Example:
        >>> weight = torch.ones(2, 3)
        >>> state = ReferenceState.zeros(weight)
        >>> reference_step(weight, torch.tensor([[1.0, 2.0, 3.0], [0.0, 4.0, 1.0]]), state, lr=0.5)
        >>> weight
        tensor([[0.5000, 0.5000, 0.5000],
                [1.0000, 0.5000, 0.5000]])
        >>> state.accumulators
        [tensor([ 9., 16.]), tensor([ 1., 16.,  9.])]
    """
    k = weight.dim()
    dtype = state.momentum_buffer.dtype
    g = -grad.to(dtype) if maximize else grad.to(dtype)
    smallest = _along(state.accumulators[0], 0, k)
    for i in range(1, k):
        smallest = torch.minimum(smallest, _along(state.accumulators[i], i, k))
    nu = g * g + smallest if beta == 0 else g * g * (1 - beta) + smallest * beta
    u = torch.rsqrt(nu + eps) * g
    if momentum > 0:
        state.momentum_buffer = state.momentum_buffer * momentum + u * (1 - momentum)
        u = state.momentum_buffer
    w = weight.to(dtype)
    if weight_decay > 0:
        w = w * (1 - lr * weight_decay)
    weight.copy_(w - u * lr)
    state.accumulators = [_maximum(nu, i) for i in range(max(k, 1))]


def _along(accumulator: Tensor, i: int, k: int) -> Tensor:
    """``mu_i``, broadcast over the other ``k - 1`` dimensions."""
    return accumulator.view([-1 if d == i else 1 for d in range(k)])


def _maximum(nu: Tensor, i: int) -> Tensor:
    """``mu_i(r)``: the largest ``nu(j)`` with ``j_i = r``."""
    if nu.dim() < 2:
        return nu
    if nu.numel() == 0:
        return nu.new_zeros(nu.shape[i])
    return nu.movedim(i, 0).flatten(1).amax(1)
