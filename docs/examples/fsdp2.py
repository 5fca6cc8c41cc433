"""FSDP2, saved by PyTorch itself: torchrun --standalone --nproc-per-node 2 docs/examples/fsdp2.py --save run/fsdp2."""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from sm3_dist import SM3


def make_model() -> nn.Module:
    """The same on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 192), nn.GELU(), nn.Linear(192, 10))


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    """The loss on the batch of one rank."""
    random = torch.Generator().manual_seed(1000 * step + rank)
    inputs, labels = torch.randn(8, 32, generator=random), torch.randint(10, (8,), generator=random)
    return nn.functional.cross_entropy(model(inputs), labels)


def train(steps: int, save: Path | None = None, resume: Path | None = None) -> nn.Module:
    """Train up to step number ``steps``, from the start or from a folder; on any number of ranks."""
    model = make_model()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = SM3.adamw_like(model.named_parameters(), lr=2e-3, momentum_dtype=torch.int8)
    start = 0
    if resume is not None:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        saved = {"model": model_state, "optimizer": optimizer_state, "step": 0}
        dcp.load(saved, checkpoint_id=resume)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        start = saved["step"]
    for step in range(start, steps):
        loss = loss_of(model, step, dist.get_rank())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    if save is not None:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state, "step": steps}, checkpoint_id=save)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--resume", type=Path)
    dist.init_process_group("gloo")
    train(**vars(parser.parse_args()))
    dist.barrier()
    dist.destroy_process_group()
