"""Entry: one original tensor with its shard and its state, as a step sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sm3_dist.layout.describe import cut_like, local_tensor
from sm3_dist.layout.kinds import is_dtensor
from sm3_dist.layout.shard import WHOLE, LocalShard
from sm3_dist.maths.rms import CUT_OFF, SquareSum
from sm3_dist.maths.rounding import Rounding
from sm3_dist.maths.update import Settings, update_rows, update_shard
from sm3_dist.step.cut_cover import CutCover
from sm3_dist.step.param_groups import averaging, corrected_averaging, first_rms

HYPERPARAMETERS = (
    *("lr", "momentum", "beta", "eps", "weight_decay", "maximize"),
    *("bias_correction", "nesterov", "update_rms", "cover_block", "cover_product"),
    *("orthogonalize", "stochastic_rounding", "rounding_seed"),
)


@dataclass(frozen=True)
class Entry:
    """One original tensor: its parameter, what this rank holds of it, and its state.

    Attributes:
        param: the parameter of the optimizer that holds it.
        group: the param group of that parameter.
        shard: what this rank holds.
        accumulators: what this rank works on of accumulator ``i``, of shape ``shard.stored[i].shape``: a view of the
            state, or a working copy.
        momentum_buffer: the local tensor, laid out like the parameter's, int8 for codes; ``None`` without momentum.
        step: how many steps the parameter has taken; 0-dimensional, on the parameter's GPU if it lies on one.
        squares: the sum that ``update_rms`` goes by; ``None`` without.
        label: what error messages call it.
        number: its place among the tensors of the optimizer, the same under every layout; keys its random numbers.
        cut_covers: the accumulators that are working copies.
    """

    param: Tensor
    group: dict[str, Any]
    shard: LocalShard
    accumulators: Sequence[Tensor]
    momentum_buffer: Tensor | None
    step: Tensor
    squares: SquareSum | None
    label: str
    number: int = 0
    cut_covers: Sequence[CutCover] = ()

    def describe(self) -> str:
        """One line, the same on every rank that plans this tensor."""
        options = {key: self.group[key] for key in HYPERPARAMETERS}
        options["lr"] = float(options["lr"])
        return ", ".join([self.describe_layout(), *(f"{key}={value}" for key, value in options.items())])

    def describe_layout(self) -> str:
        """That part of it from which follows what a plan exchanges."""
        words = (
            f"{self.label}: shape {self.shard.shape}, {self.param.dtype}, requires_grad={self.param.requires_grad}, "
            f"{self.shard.layout}, cover_block={self.shard.cover_block}"
        )
        if self.momentum_buffer is not None:
            words += f", momentum in {self.momentum_buffer.dtype}"
        if self.squares is not None:
            words += ", with update_rms"
        return words + (f", number {self.number}" if self.rounds else "")

    @property
    def rounds(self) -> bool:
        """Whether weight or momentum is rounded stochastically."""
        types = [tensor.dtype for tensor in (self.param, self.momentum_buffer) if tensor is not None]
        return torch.int8 in types or (bool(self.group["stochastic_rounding"]) and torch.bfloat16 in types)

    def update(self, settings: Settings) -> None:
        """Take one step, if the parameter has a gradient. Without one everything stays as it is."""
        grad = self.param.grad
        if grad is None:
            return
        settings = self._of_this_tensor(settings)
        if grad.is_sparse:
            if self.squares is not None or self.shard.cover_block is not None or self.rounds:
                raise NotImplementedError(
                    f"{self.label} has a sparse gradient, which SM3 takes without update_rms, cover_block, "
                    "stochastic_rounding and 8-bit momentum alone. Put it into a param group of its own with "
                    "update_rms=None, cover_block=None, cover_product=False, stochastic_rounding=False, and with "
                    "momentum=0 and nesterov=False, which sparse gradients do not use."
                )
            if self.shard.layout != WHOLE:
                raise NotImplementedError(
                    f"{self.label} has a sparse gradient, which SM3 takes for unsharded parameters alone, but its "
                    f"layout is {self.shard.layout}. Use nn.Embedding(..., sparse=False) here."
                )
            settings = replace(settings, scale=settings.direction)
            update_rows(self.param, grad, self.accumulators, settings)
        elif self.shard.boxes:
            weight, grad = local_tensor(self.param), self.local_grad(grad)
            update_shard(self.shard, weight, grad, self.accumulators, self.momentum_buffer, settings, self.squares)

    def _of_this_tensor(self, settings: Settings) -> Settings:
        """The settings of the group, with what depends on the steps that this tensor has taken."""
        if self.group["bias_correction"]:
            old, new = self._averaging()
            settings = replace(settings, old=old, new=new)
        if self.squares is not None:
            rms = self.group["update_rms"] * settings.fresh
            first = first_rms(self.group)
            scale = self.squares.scale(rms, first, self.accumulators[0].dtype)
            carrier = self.squares.carrier(first)
            settings = replace(settings, scale=scale, carrier=carrier, limit=CUT_OFF * abs(rms))
        return replace(settings, rounding=self.rounding())

    def rounding(self) -> Rounding | None:
        """How this tensor is rounded in the step to come; ``None``: to the nearest. The host waits for no GPU."""
        if not self.rounds:
            return None
        seed, bfloat16 = self.group["rounding_seed"], bool(self.group["stochastic_rounding"])
        step = int(self.step.item()) if self.step.device.type == "cpu" else self.step.long()
        return Rounding(seed, step, self.number, self.shard.shape, bfloat16)

    def _averaging(self) -> tuple[float | Tensor, float | Tensor]:
        """The weights of ``nu`` with bias correction. The host does not wait for a GPU to tell the number of steps."""
        if self.step.device.type == "cpu":
            return averaging(self.group, self.step.item())
        beta = torch.full_like(self.step, self.group["beta"], dtype=torch.float64)
        old, new = corrected_averaging(beta, self.step)
        return old.to(self.accumulators[0].dtype), new.to(self.accumulators[0].dtype)

    def local_grad(self, grad: Tensor) -> Tensor:
        """The gradient of exactly the elements that this rank holds."""
        if is_dtensor(self.param):
            if not is_dtensor(grad):
                raise TypeError(
                    f"{self.label} is a DTensor, but its gradient is a plain tensor of shape {tuple(grad.shape)}. "
                    "Assign a DTensor with the parameter's mesh and placements."
                )
            part = local_tensor(cut_like(grad, self.param))  # (Partial where autograd left the sum to the optimizer)
            if part.numel() != self.shard.numel:  # PyTorch compares the whole tensors alone
                raise ValueError(
                    f"of {self.label} this rank holds {self.shard.numel} elements, but of its gradient "
                    f"{part.numel()}, with the same placements {self.param.placements}: it was not cut as the "
                    "parameter was."
                )
            return part
        return grad
