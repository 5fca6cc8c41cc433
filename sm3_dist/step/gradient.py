"""The gradient of a parameter as this rank has it, once it is a sum no longer."""

from __future__ import annotations

from torch import Tensor

from sm3_dist.layout.describe import cut_like, local_tensor
from sm3_dist.layout.kinds import is_dtensor


def settled_gradient(param: Tensor) -> Tensor | None:
    """The values of the gradient that this rank holds; ``None`` for no gradient.

    Where it is yet to be summed, over ranks (``Partial`` placements, then a collective) or over the values of one index
    of a sparse tensor, the sum takes its place as ``param.grad``.
    """
    grad = param.grad
    if grad is None or (type(grad) is Tensor and not grad.is_sparse):
        return grad
    if is_dtensor(param) and is_dtensor(grad) and (cut := cut_like(grad, param)) is not grad:
        param.grad = grad = cut
    if grad.is_sparse:
        param.grad = grad = grad.coalesce()
        return grad.values()
    return local_tensor(grad)
