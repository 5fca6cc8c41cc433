"""DistributedDataParallel: torchrun --standalone --nproc-per-node 2 docs/examples/ddp.py --save run/ddp.pt."""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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
    """Train up to step number ``steps``, from the start or from a file."""
    model = DistributedDataParallel(make_model())
    optimizer = SM3.adamw_like(model.module.named_parameters(), lr=2e-3, momentum_dtype=torch.int8)
    start = 0
    if resume is not None:
        saved = torch.load(resume, weights_only=True)
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    for step in range(start, steps):
        loss = loss_of(model, step, dist.get_rank())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    if save is not None and dist.get_rank() == 0:  # every rank holds the same
        save.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": steps}
        torch.save(state, save)
    return model.module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--resume", type=Path)
    dist.init_process_group("gloo")
    train(**vars(parser.parse_args()))
    dist.barrier()
    dist.destroy_process_group()
