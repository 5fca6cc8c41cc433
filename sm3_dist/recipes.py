"""Recipes as classes, for whatever makes an optimizer from a class, params and keywords alone.

So do ``transformers.Trainer(optimizer_cls_and_kwargs=...)``, torchtitan, and configuration files that name a class. A
recipe is SM3 with other defaults: nothing of a step, its state or its checkpoints knows of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from sm3_dist.optimizer import SM3
from sm3_dist.step.param_groups import adamw_like_options


class AdamWLikeSM3(SM3):
    """SM3 with the options that measurements favour, to be used at AdamW's learning rates; as a class.

    ``AdamWLikeSM3(params, lr, **options)`` is ``SM3.adamw_like(params, lr, **options)``, whose description says what
    the options are. Each loads what the other saved.

    Args:
        params: as for :class:`~sm3_dist.SM3`.
        lr: learning rate, as for :class:`torch.optim.AdamW`.
        options: further arguments of :class:`~sm3_dist.SM3`, and others in place of those of the recipe.

    Raises:
        ValueError, TypeError: as :class:`~sm3_dist.SM3`.

    Example:
        >>> import torch
        >>> from sm3_dist import AdamWLikeSM3
        >>> layer = torch.nn.Linear(64, 48)
        >>> optimizer = AdamWLikeSM3(layer.parameters(), lr=2e-3, momentum_dtype=torch.bfloat16)
        >>> layer(torch.ones(2, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.state[layer.weight]["momentum_buffer"].dtype
        torch.bfloat16
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, **adamw_like_options(options))
