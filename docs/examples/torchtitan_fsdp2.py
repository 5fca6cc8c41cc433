"""torchtitan: torchrun --standalone --nproc-per-node 2 docs/examples/torchtitan_fsdp2.py --save run/titan."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

import sm3_dist


class SM3OptimizersContainer(OptimizersContainer):
    """torchtitan's, which also knows the optimizers of sm3_dist by name."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """As torchtitan's; it builds this container."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        if name in ("SM3", "AdamWLikeSM3", "MuonLikeSM3"):
            return getattr(sm3_dist, name)
        return OptimizersContainer._resolve_optimizer_factory(name)


def make_model() -> nn.Module:
    """The same on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 192), nn.GELU(), nn.Linear(192, 10))


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    """The loss on the batch of one rank."""
    random = torch.Generator().manual_seed(1000 * step + rank)
    inputs, labels = torch.randn(8, 32, generator=random), torch.randint(10, (8,), generator=random)
    return nn.functional.cross_entropy(model(inputs), labels)


def make_config(name: str = "AdamWLikeSM3", **options: Any) -> SM3OptimizersContainer.Config:
    """What stands under ``optimizer=`` in a torchtitan configuration: no decay of biases, all else with decay."""
    return SM3OptimizersContainer.Config(
        implementation="for-loop",  # for torch's optimizers; SM3 finds its own kernels
        param_groups=[
            ParamGroupConfig(pattern=r"bias$", optimizer_name=name, optimizer_kwargs={"lr": 2e-3}),
            ParamGroupConfig(pattern=".*", optimizer_name=name, optimizer_kwargs={"lr": 2e-3, "weight_decay": 0.1}),
        ],
        optimizer_factory_kwargs_by_name={name: options},  # what is not a matter of groups: momentum_dtype, backend, …
    )


def train(
    steps: int,
    save: Path | None = None,
    resume: Path | None = None,
    config: SM3OptimizersContainer.Config | None = None,
) -> nn.Module:
    """Train up to step number ``steps``, from the start or from a folder; on any number of ranks."""
    model = make_model()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    config = config or make_config(momentum_dtype=torch.int8)
    optimizers = config.build(model_parts=[model])
    start = 0
    if resume is not None:
        saved = {"model": get_model_state_dict(model), "optimizer": optimizers, "step": 0}
        dcp.load(saved, checkpoint_id=resume)
        start = saved["step"]
    for step in range(start, steps):
        loss = loss_of(model, step, dist.get_rank())
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    if save is not None:
        dcp.save({"model": get_model_state_dict(model), "optimizer": optimizers, "step": steps}, checkpoint_id=save)
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
