"""Peers: other people's optimizers, to compare with. Their packages are the extra ``compare``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.overrides import TorchFunctionMode

from launch.job.packages import load
from launch.job.settings import Settings
from sm3_dist.maths.orthogonal import product_type


def lion(model: nn.Module, s: Settings) -> Optimizer:
    """Lion (arXiv 2302.06675): momentum and the sign; no second moment."""
    return _from("lion_pytorch", "Lion")(model.parameters(), s.lr, (s.momentum, s.beta), weight_decay=s.weight_decay)


def adamw_8bit(model: nn.Module, s: Settings) -> Optimizer:
    """AdamW whose moments have 8 bits (arXiv 2110.02861), as torchao has it."""
    make = _from("torchao.optim", "AdamW8bit")
    return make(model.parameters(), s.lr, (s.momentum, s.beta), weight_decay=s.weight_decay)


def adafactor_transformers(model: nn.Module, s: Settings) -> Optimizer:
    """Adafactor (arXiv 1804.04235) as transformers has it, with a learning rate from outside."""
    make = _from("transformers.optimization", "Adafactor")
    return make(model.parameters(), s.lr, relative_step=False, scale_parameter=False, weight_decay=s.weight_decay)


def came(model: nn.Module, s: Settings) -> Optimizer:
    """CAME (arXiv 2307.02047): Adafactor, with confidence."""
    make = _from("came_pytorch", "CAME")
    return make(model.parameters(), s.lr, betas=(s.momentum, s.beta, 0.9999), weight_decay=s.weight_decay)


def muon(model: nn.Module, s: Settings) -> Optimizer:
    """Muon (arXiv 2502.16982) on the matrices within the blocks, with AdamW's update size; AdamW on the rest."""
    matrices, rest = _split(model)
    return Together(
        Muon(matrices, s.lr, momentum=s.momentum, weight_decay=s.weight_decay, adjust_lr_fn="match_rms_adamw"),
        AdamW(rest, s.lr, (0.9, s.beta), weight_decay=s.weight_decay),
    )


def normuon(model: nn.Module, s: Settings) -> Optimizer:
    """Muon whose updates are divided by the root mean square of their rows (arXiv 2510.05491), likewise."""
    matrices, rest = _split(model)
    group = {"params": matrices, "use_muon": True, "weight_decay": s.weight_decay}
    make = _from("pytorch_optimizer", "NorMuon")
    return Together(
        make([group], s.lr, momentum=s.momentum, beta2=s.beta, update_scale="match_rms", foreach=False),
        AdamW(rest, s.lr, (0.9, s.beta), weight_decay=s.weight_decay),
    )


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices within the blocks, and the rest."""
    inner = {name for name, p in model.named_parameters() if p.dim() == 2 and "blocks." in name}
    named = list(model.named_parameters())
    return [p for name, p in named if name in inner], [p for name, p in named if name not in inner]


class WideProducts(TorchFunctionMode):
    """Products of bfloat16 matrices are made in float32, and rounded: much faster on processors without bfloat16.

    Sums within products are in float32 either way. `torch.optim.Muon` makes nothing but such products.
    """

    PRODUCTS = (torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul, torch.mm, torch.addmm)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what torch calls, of products with wider arguments."""
        kwargs = kwargs or {}
        if function not in self.PRODUCTS or args[0].dtype != torch.bfloat16:
            return function(*args, **kwargs)
        wide = product_type(args[0].device)
        return function(*(each.to(wide) for each in args), **kwargs).to(torch.bfloat16)


class Together(Optimizer):
    """Optimizers of different parameters as one; the param groups are theirs, so one schedule drives all.

    Args:
        parts: the optimizers.
    """

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of each parameter."""
        return defaultdict(dict, {p: state for part in self.parts for p, state in part.state.items()})

    @state.setter
    def state(self, value: object) -> None:
        """The parts have their own."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Let each take its step."""
        with WideProducts():
            for part in self.parts:
                part.step()


def _from(module: str, name: str) -> Callable[..., Optimizer]:
    found: Callable[..., Optimizer] = getattr(load(module), name)
    return found
