"""TrainState: everything that a training run needs to go on as if it had never stopped."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sm3_dist.checkpoint.canonical import Canonical, sm3_within
from sm3_dist.checkpoint.rng import restore_rng, save_rng
from sm3_dist.checkpoint.state_dict import get_state_dict, set_state_dict

FORMAT_VERSION = 1


class TrainState(Stateful):
    """Model, optimizer, LR scheduler, step, data position and random numbers, for ``torch.distributed.checkpoint``.

    ``torch.distributed.checkpoint.save`` and ``async_save`` take it as a value of their state dict, and so does
    :func:`sm3_dist.checkpoint.load`. It is the same however many ranks save it and under whatever wrapper, but for the
    random numbers, which continue only on the same number of ranks.

    Args:
        model: the wrapped root module.
        optimizers: one or more that train its parameters.
        scheduler: the learning-rate scheduler, if there is one.
        data: anything with ``state_dict()`` and ``load_state_dict()``, the same on every rank: where the data stands.
        step: number of steps taken. Count it up as you train.

    Example:
        >>> import tempfile, torch
        >>> import torch.distributed.checkpoint as dcp
        >>> from sm3_dist import SM3
        >>> from sm3_dist.checkpoint import TrainState, load
        >>> def start():
        ...     model = torch.nn.Linear(4, 3)
        ...     return TrainState(model, SM3(model.parameters(), momentum=0.9))
        >>> state = start()
        >>> state.step = 7
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = dcp.save({"train": state}, checkpoint_id=folder, no_dist=True)
        ...     other = start()
        ...     load({"train": other}, folder)
        >>> other.step, torch.equal(other.model.weight, state.model.weight)
        (7, True)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Iterable[Optimizer],
        scheduler: LRScheduler | None = None,
        *,
        data: Stateful | None = None,
        step: int = 0,
    ) -> None:
        self.model = model
        self.optimizers = (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)
        self.scheduler = scheduler
        self.data = data
        self.step = step
        self._expected: Sequence[dict[str, Any]] = ()  # param groups, as they were saved

    def state_dict(self, *, cpu_offload: bool = False) -> dict[str, Any]:
        """Everything, by name. Call it on every rank.

        Args:
            cpu_offload: whether to move tensors to the CPU.
        """
        options = StateDictOptions(cpu_offload=cpu_offload)
        model, optimizer = get_state_dict(self.model, self.optimizers, options=options)
        if self._expected:
            optimizer["param_groups"] = copy.deepcopy(self._expected)
        state = {
            "format_version": FORMAT_VERSION,
            "model": model,
            "optimizer": optimizer,
            "step": self.step,
            "rng": save_rng(),
        }
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler.state_dict()
        if self.data is not None:
            state["data"] = self.data.state_dict()
        return state

    def expect(self, keys: Mapping[str, Sequence[str]], groups: Sequence[dict[str, Any]]) -> None:
        """Get ready for a checkpoint that is to be loaded in place, until :meth:`expect_nothing`. On every rank.

        Optimizers make the state of frozen parameters that it has something of, and param groups are read as they were
        saved: they belong to tensors by name.

        Args:
            keys: those of the state of each tensor, by canonical name.
            groups: the param groups; empty where they are not known.

        Raises:
            ValueError: if it does not fit.
        """
        for optimizer in self.optimizers:
            if sm3_within(optimizer) is not None:
                canonical = Canonical(self.model, optimizer)
                canonical.make_room(keys)
                canonical.check_ahead(keys, groups)
        self._expected = groups

    def expect_nothing(self) -> None:
        """Go back to what there is."""
        self._expected = ()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take everything over. Call it on every rank.

        Raises:
            ValueError: if a newer version of this package wrote it, or it does not fit the optimizers; these and the
                model are then as they were, unless loading in place has written into them.
            RuntimeError: if the weights are those of another model; the optimizers are as they were.
        """
        check_version(state_dict["format_version"])
        set_state_dict(
            self.model,
            self.optimizers,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )
        self.step = state_dict["step"]
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state_dict["scheduler"])
        if self.data is not None:
            self.data.load_state_dict(state_dict["data"])
        restore_rng(state_dict["rng"])


def check_version(version: Any) -> None:
    """Raise unless this package can read what was written in this version of the format."""
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"the checkpoint has format version {version!r}, and this version of sm3_dist reads versions up to "
            f"{FORMAT_VERSION}. Load it with a newer sm3_dist."
        )
