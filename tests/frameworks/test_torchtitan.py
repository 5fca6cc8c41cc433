"""torchtitan's OptimizersContainer, unmodified: it comes to what a plain loop comes to, interrupted or not."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from plain_loop import differing, plain_loop, weights_of
from torch import nn

from sm3_dist import SM3, AdamWLikeSM3, MuonLikeSM3

# Not imported here, where it would take seconds of every process that collects tests.
pytestmark = pytest.mark.skipif(find_spec("torchtitan") is None, reason="needs pip install 'sm3_dist[frameworks]'")

STEPS = 5
KINDS: dict[str, tuple[type[SM3], dict[str, Any]]] = {
    "recipe, int8": (AdamWLikeSM3, {"momentum_dtype": torch.int8}),
    "recipe, bfloat16": (AdamWLikeSM3, {"momentum_dtype": torch.bfloat16}),
    "paper": (SM3, {"momentum": 0.9}),
    "orthogonal": (MuonLikeSM3, {"momentum_dtype": torch.int8}),
}


def against_a_plain_loop(kind: str, folder: Path) -> tuple[list[str], list[str]]:
    """Names of weights in which torchtitan differs from a plain loop, and when interrupted from uninterrupted."""
    import torchtitan_fsdp2 as example

    optimizer, options = KINDS[kind]

    def optimizer_of(model: nn.Module) -> SM3:
        named = list(model.named_parameters())
        biases = {"params": [each for each in named if each[0].endswith("bias")]}
        weights = {"params": [each for each in named if not each[0].endswith("bias")], "weight_decay": 0.1}
        return optimizer([biases, weights], lr=2e-3, **options)

    config = example.make_config(optimizer.__name__, **options)
    expected = plain_loop(example.make_model(), optimizer_of, example.loss_of, dist.get_world_size(), STEPS)
    whole = weights_of(example.train(STEPS, config=config))
    example.train(2, save=folder, config=config)
    resumed = weights_of(example.train(STEPS, resume=folder, config=config))
    return differing(whole, expected), differing(resumed, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_torchtitan_trains_as_a_plain_loop(workers: Pool, tmp_path: Path, kind: str) -> None:
    assert workers(2).run(against_a_plain_loop, kind, tmp_path) == [([], [])] * 2


def test_torchtitan_goes_on_knowing_its_own_optimizers() -> None:
    from torchtitan_fsdp2 import SM3OptimizersContainer

    assert SM3OptimizersContainer._resolve_optimizer_factory("AdamW") is torch.optim.AdamW
    with pytest.raises(NotImplementedError, match="Adagrad"):
        SM3OptimizersContainer._resolve_optimizer_factory("Adagrad")
