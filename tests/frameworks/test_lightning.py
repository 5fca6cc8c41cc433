"""Lightning, unmodified: it comes to what a plain loop comes to, interrupted or not, clipped, in bfloat16."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from plain_loop import differing, number_of_ranks, plain_loop, whole_weights
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DistributedSampler

from sm3_dist import SM3, MuonLikeSM3

# Not imported here, where it would take seconds of every process that collects tests.
pytestmark = pytest.mark.skipif(find_spec("lightning") is None, reason="needs pip install 'sm3_dist[frameworks]'")

EPOCHS = 3
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "clipped": {"gradient_clip_val": 0.5},
    "bf16-mixed, clipped": {"precision": "bf16-mixed", "gradient_clip_val": 0.5},
}


def fsdp(device: str) -> Any:
    """Lightning's FSDPStrategy, which wants a GPU, though PyTorch does not: so a class of its own wraps on the CPU."""
    from lightning.pytorch.strategies import FSDPStrategy

    options: dict[str, Any] = {"state_dict_type": "sharded", "use_orig_params": True}
    if device != "cpu":
        return FSDPStrategy(**options)

    class OnCPU(FSDPStrategy):
        def _setup_model(self, model: nn.Module) -> nn.Module:
            return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)

    return OnCPU(process_group_backend="gloo", **options)


@contextmanager
def ranks_told(device: str) -> Iterator[None]:
    """Lightning makes no processes where it finds what torchrun would say; on a GPU torchrun did say it."""
    if device == "cpu" and dist.get_world_size() > 1:
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": "0"}
        with patch.dict(os.environ, places):
            yield
    else:
        yield


def against_a_plain_loop(
    options: dict[str, Any],
    folder: Path,
    sharded: bool = False,
    device: str = "cpu",
    recipe: Callable[..., SM3] = SM3.adamw_like,
) -> tuple[list[str], list[str]]:
    """Names of weights in which Lightning differs from a plain loop, and when interrupted from uninterrupted."""
    import lightning_ddp as example
    from lightning.pytorch.strategies import DDPStrategy

    ranks, data = number_of_ranks(), example.make_data()
    autocast = torch.autocast(device, torch.bfloat16, enabled="precision" in options, cache_enabled=False)

    steps = len(data) // (example.BATCH * ranks)  # of an epoch

    def loss_of(module: nn.Module, step: int, rank: int) -> Tensor:
        epoch, step = divmod(step, steps)
        indices = range(len(data))
        if ranks > 1 or sharded:  # Lightning replaces the sampler by this one
            sampler = DistributedSampler(data, ranks, rank)
            sampler.set_epoch(epoch)
            indices = list(sampler)
        indices = list(indices[step * example.BATCH : (step + 1) * example.BATCH])
        with autocast:
            return module.training_step(tuple(part.to(device) for part in data[indices]), 0)

    def optimizer_of(module: nn.Module) -> SM3:
        return recipe(module.named_parameters(), lr=2e-3, momentum_dtype=torch.bfloat16)

    accelerator = "cpu" if device == "cpu" else "gpu"
    lightning = {"accelerator": accelerator, "devices": ranks, "enable_model_summary": False, **options}
    expected = plain_loop(
        example.Module().to(device), optimizer_of, loss_of, ranks, EPOCHS * steps, options.get("gradient_clip_val")
    )

    def strategy() -> Any:
        if sharded:
            return fsdp(device)
        return DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto"

    def trained(epochs: int, **files: Path) -> dict[str, Tensor]:
        model = example.train(epochs, strategy=strategy(), **files, **lightning)
        return whole_weights(model.trainer.model if sharded else model)

    with ranks_told(device), patch.object(example, "SM3", SimpleNamespace(adamw_like=recipe)):
        whole = trained(EPOCHS)
        trained(1, save=folder / "cut.ckpt")
        resumed = trained(EPOCHS, resume=folder / "cut.ckpt")
    return differing(whole, expected), differing(resumed, whole)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_lightning_trains_as_a_plain_loop(workers: Pool, tmp_path: Path, options: dict[str, Any], ranks: int) -> None:
    assert workers(ranks).run(against_a_plain_loop, options, tmp_path) == [([], [])] * ranks


@pytest.mark.parametrize("ranks", [1, 2])
def test_lightning_under_fsdp1_trains_as_a_plain_loop(workers: Pool, tmp_path: Path, ranks: int) -> None:
    assert workers(ranks).run(against_a_plain_loop, {}, tmp_path, True) == [([], [])] * ranks


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP1"])
def test_orthogonal_updates_under_lightning(workers: Pool, tmp_path: Path, sharded: bool) -> None:
    assert workers(2).run(against_a_plain_loop, {}, tmp_path, sharded, "cpu", MuonLikeSM3) == [([], [])] * 2
