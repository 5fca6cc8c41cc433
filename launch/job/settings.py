"""The settings of an optimizer: the hyperparameters that a recipe fixes and the command line may change."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Hyperparameters, of any optimizer; one that has no such hyperparameter ignores the default.

    Args:
        lr: learning rate after warm-up.
        momentum: decay of the momentum; AdamW's beta1. Of SM3's muon-like recipe that of the matrices alone.
        beta: decay of the squared gradients; AdamW's beta2. For SM3 0 sums them.
        weight_decay: decoupled weight decay.
        cover_block: SM3: elements of a row that one accumulator entry covers.
        momentum_dtype: SM3: name of the type of the momentum.
        rounding: SM3: "stochastic" or "nearest".
    """

    lr: float
    momentum: float = 0.0
    beta: float = 0.0
    weight_decay: float = 0.0
    cover_block: int | None = None
    momentum_dtype: str | None = None
    rounding: str | None = None
