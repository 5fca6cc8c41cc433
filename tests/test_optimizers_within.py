"""Checkpoints of SM3 within optimizers that give each rank some of the tensors: fairscale's OSS, and PyTorch's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Pool
from moving import SETTINGS, STEPS, Net, Wrapped, differences, expected, fresh, spoil, train, trained, with_settings
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.optim import ZeroRedundancyOptimizer

from sm3_dist import SM3
from sm3_dist.checkpoint import StateDictOptions, TrainState, get_optimizer_state_dict, load, set_optimizer_state_dict

NARROW = {"momentum_dtype": torch.bfloat16}
"""An argument of the optimizer as a whole, which these wrappers put into their param groups."""


def within(kind: str) -> Wrapped:
    from fairscale.optim import OSS

    model = Net()
    if kind == "oss":
        return Wrapped(model, OSS(model.parameters(), optim=SM3, **SETTINGS))
    return Wrapped(model, ZeroRedundancyOptimizer(model.parameters(), optimizer_class=SM3, **SETTINGS))


def to_and_fro(kind: str, folder: Path) -> list[str]:
    """Save from one process, load within, save there, load in one process; after an error on one rank."""
    save({"train": TrainState(*trained(), step=STEPS)}, checkpoint_id=folder / "alone")
    wrapped = within(kind)
    state: dict[str, Any] = get_optimizer_state_dict(*trained())
    for name in state["state"]:
        less = state | {"state": {other: values for other, values in state["state"].items() if other != name}}
        with pytest.raises(ValueError, match=name):  # of which one rank has something
            set_optimizer_state_dict(*wrapped, less, options=StateDictOptions(True, broadcast_from_rank0=True))
    load({"train": TrainState(*wrapped)}, folder / "alone")
    found = differences(wrapped, expected(STEPS))
    train(wrapped, range(STEPS, STEPS + 1))
    save({"train": TrainState(*wrapped)}, checkpoint_id=folder / "within")
    again = fresh()
    spoil(Wrapped(again.model, again.optimizers[0]))
    load({"train": again}, folder / "within")
    return found + differences(Wrapped(again.model, again.optimizers[0]), expected(STEPS + 1))


@pytest.mark.parametrize("kind", ["oss", "ZeroRedundancyOptimizer"])
def test_checkpoints_go_in_and_out(workers: Pool, tmp_path: Path, kind: str) -> None:
    assert workers(2).run(with_settings, NARROW, to_and_fro, kind, tmp_path) == [[]] * 2
