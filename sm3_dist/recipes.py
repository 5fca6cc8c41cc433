"""Recipes as classes, for whatever makes an optimizer from a class, params and keywords alone.

So do ``transformers.Trainer(optimizer_cls_and_kwargs=...)``, torchtitan, and configuration files that name a class. A
recipe is SM3 with other defaults: nothing of a step, its state or its checkpoints knows of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from sm3_dist.matrices import Picker, split, with_matrices
from sm3_dist.optimizer import SM3
from sm3_dist.step.param_groups import MATRIX, adamw_like_options


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


class MuonLikeSM3(SM3):
    """:class:`AdamWLikeSM3` with the updates of matrices made orthogonal, as Muon's are. For training from scratch.

    Matrices are the weights of two dimensions, and of convolutions, but for:

    - vectors in the form of matrices, ``(1, n)`` and ``(n, 1)``;
    - weights of modules whose type is called an embedding;
    - tensors with a module on their way whose name has ``embed`` in it or is ``wte``, ``wpe``, ``pos`` or ``position``;
    - weights of a module called ``head``, ``lm_head``, ``output``, ``classifier``, ``score`` or ``logits``;
    - those that are tied to one of these.

    Each param group becomes one of matrices, with ``orthogonalize=True``, momentum of 0.95, covers of whole rows and
    columns and no ``update_rms``, and one of the rest, which is stepped as :class:`AdamWLikeSM3` does, those of
    :meth:`add_param_group` too. One that says ``orthogonalize`` itself stays as it is. What this brings is in
    ``docs/quality.md``.

    Args:
        params: as for :class:`~sm3_dist.SM3`; with names (``model.named_parameters()``) if there is no ``model``.
        lr: learning rate of all, about that of :class:`torch.optim.AdamW` or twice that.
        model: the model, as wrapped.
        options: further arguments of :class:`~sm3_dist.SM3`, and others in place of those of the recipe; covers and
            ``update_rms`` are those of the rest.

    Raises:
        ValueError: if a parameter has neither a name nor a place in the model, or was flattened of matrices and others;
            and as :class:`~sm3_dist.SM3`.
        TypeError: for ``orthogonalize=``, which belongs into param groups; and as :class:`~sm3_dist.SM3`.

    Example:
        >>> import torch
        >>> from sm3_dist import MuonLikeSM3
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 64), torch.nn.Linear(64, 48))
        >>> optimizer = MuonLikeSM3(model.parameters(), lr=2e-3, model=model, momentum_dtype=torch.bfloat16)
        >>> [(group["orthogonalize"], [tuple(p.shape) for p in group["params"]]) for group in optimizer.param_groups]
        [(True, [(48, 64)]), (False, [(9, 64), (48,)])]
    """

    _picker: Picker | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        *,
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        if "orthogonalize" in options:
            raise TypeError(
                f"MuonLikeSM3 picks the matrices itself, and takes no orthogonalize={options['orthogonalize']!r}. Say "
                "it in a param group, {'params': ..., 'orthogonalize': False}, or for all parameters to SM3."
            )
        self._matrix = MATRIX | {"momentum": options.get("momentum", MATRIX["momentum"])}
        self._picker = Picker(model)  # of the groups that are given now: it holds on to parameters
        super().__init__(params, lr, model=model, **adamw_like_options(options))
        self._picker = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group: one of its matrices and one of the rest, as far as there are any.

        On every rank, if on any.

        Raises:
            ValueError, TypeError: as the class; nothing is added then.
        """
        before = len(self.param_groups)
        try:
            for group in split(param_group, self._picker or Picker(self._keeper.flattened.model)):
                matrix = isinstance(group, dict) and group.get("orthogonalize") is True
                super().add_param_group(self._matrix | group if matrix else group)
        except Exception:
            self._without_momentum -= set(range(before, len(self.param_groups)))
            del self.param_groups[before:]
            raise

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_matrix": self._matrix}

    @staticmethod
    def groups(
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        model: nn.Module | None = None,
    ) -> list[dict[str, Any]]:
        """The param groups that it makes: for wrappers of optimizers, such as fairscale's OSS, which must have them.

        Args:
            params: as for the class.
            model: as for the class.
        """
        return with_matrices(params, model)
