"""Contenders: optimizers that take a step beside one another, SM3 in its variants and those of other people."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer

from launch.job.peers import Together
from sm3_dist import SM3, kernels
from sm3_dist.step.param_groups import ADAMW_LIKE, MATRIX

LR = 1e-6  # weights hardly move, however many steps are measured
REFERENCES = ("SGD(fused)", "AdamW(fused)")
"""What the others are compared with."""
Make = Callable[[Sequence[Tensor]], Optimizer]

NARROW: dict[str, Any] = {"momentum_dtype": torch.bfloat16}
NARROWEST: dict[str, Any] = {"momentum_dtype": torch.int8, "stochastic_rounding": True, "rounding_seed": 0}
GUARDED: dict[str, Any] = {"skip_nonfinite": "parameter"}
VARIANTS: dict[str, Callable[..., SM3]] = {
    "SM3, {}": SM3,
    "SM3, {}, momentum": partial(SM3, momentum=0.9),
    "SM3, {}, bfloat16 momentum": partial(SM3, momentum=0.9, **NARROW),
    "SM3, {}, momentum, skip_nonfinite": partial(SM3, momentum=0.9, **GUARDED),
    "recipe, {}": SM3.adamw_like,
    "recipe, {}, skip_nonfinite": partial(SM3.adamw_like, **GUARDED),
    "recipe, {}, bfloat16 momentum": partial(SM3.adamw_like, **NARROW),
    "recipe, {}, 8-bit momentum, stochastic rounding": partial(SM3.adamw_like, **NARROWEST),
}
PEERS: dict[str, tuple[str, str, str]] = {  # module, class, type of the device that it needs or ""
    "torch-SM3": ("SM3", "SM3", ""),
    "pytorch_optimizer SM3": ("pytorch_optimizer", "SM3", ""),
    "DeepSpeedCPUAdam": ("deepspeed.ops.adam", "DeepSpeedCPUAdam", "cpu"),
    "FlashAdamW": ("flashoptim", "FlashAdamW", "cuda"),  # databricks/flashoptim
    "bitsandbytes AdamW8bit": ("bitsandbytes.optim", "AdamW8bit", "cuda"),
}


def contenders(device: str, dtype: torch.dtype, only: Sequence[str] | None = None) -> dict[str, Make]:
    """By name what makes an optimizer of parameters.

    Args:
        device: type of the device that they are on.
        dtype: type of the parameters.
        only: beginnings of the names that are wanted, besides ``REFERENCES``; ``None``: all.
    """
    found: dict[str, Make] = {
        "SGD(fused)": partial(SGD, lr=LR, fused=True),
        "AdamW(fused)": partial(AdamW, lr=LR, fused=True),
        "AdamW(foreach)": partial(AdamW, lr=LR, foreach=True),
        "Adafactor": partial(Adafactor, lr=LR),
        "Muon": muon,
        "muon-like": muon_like,
        "muon-like, 8-bit momentum": partial(muon_like, momentum_dtype=torch.int8),
    }
    for backend in ("c" if device == "cpu" else "triton", "eager"):
        if kernels.available()[backend] is None:
            for name, make in VARIANTS.items():
                found[name.format(backend)] = partial(make, lr=LR, backend=backend)
    for name, (module, kind, needed) in PEERS.items():
        package = module.partition(".")[0]
        narrow = name == "FlashAdamW" and dtype == torch.float32  # keeps a residue of what is narrower
        if needed in ("", device) and not narrow and importlib.util.find_spec(package) is not None:
            found[name] = partial(getattr(importlib.import_module(module), kind), lr=LR)
    wanted = None if only is None else (*REFERENCES, *only)
    return {name: make for name, make in found.items() if wanted is None or name.startswith(wanted)}


def muon(params: Sequence[Tensor]) -> Optimizer:
    """torch.optim.Muon on the matrices, which it takes alone, and AdamW on the rest."""
    rest = [param for param in params if param.dim() != 2]
    matrices = Muon([param for param in params if param.dim() == 2], LR, adjust_lr_fn="match_rms_adamw")
    return Together(matrices, AdamW(rest, LR, fused=True)) if rest else matrices


def muon_like(params: Sequence[Tensor], **options: Any) -> Optimizer:
    """SM3 with orthogonal updates on the matrices, and its recipe on the rest: what ``MuonLikeSM3`` makes by names."""
    groups: list[dict[str, Any]] = [{"params": [param for param in params if param.dim() == 2], **MATRIX}]
    rest = [param for param in params if param.dim() != 2]
    groups += [{"params": rest}] if rest else []
    return SM3(groups, LR, **ADAMW_LIKE | options)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the state, those within other objects included."""
    counted: dict[int, int] = {}

    def count(value: Any) -> None:
        if id(value) in counted:
            return
        counted[id(value)] = 0
        if isinstance(value, Tensor):
            counted[id(value)] = value.numel() * value.element_size()
        elif isinstance(value, dict):
            for each in value.values():
                count(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                count(each)
        elif hasattr(value, "__dict__"):
            count(vars(value))

    count(dict(optimizer.state))
    return sum(counted.values())
