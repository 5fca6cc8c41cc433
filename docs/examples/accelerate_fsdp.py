"""accelerate: accelerate launch --num_processes 2 docs/examples/accelerate_fsdp.py --fsdp 2 --save run/state."""

import argparse
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sm3_dist import SM3

BATCH = 8  # per rank


def make_model() -> nn.Module:
    """The same on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 192), nn.GELU(), nn.Linear(192, 10))


def make_data() -> TensorDataset:
    """The same on every rank; accelerate deals it out."""
    random = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(1024, 32, generator=random), torch.randint(10, (1024,), generator=random))


class Progress:
    """How many steps were taken; saved with everything else."""

    step = 0

    def state_dict(self) -> dict[str, int]:
        """What is saved."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.step = state["step"]


def loss_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Of one batch."""
    return nn.functional.cross_entropy(model(inputs), labels)


def train(
    steps: int, fsdp: int | None, save: Path | None = None, resume: Path | None = None, clip: float | None = None
) -> nn.Module:
    """Train up to step number ``steps``, under FSDP1, FSDP2 or DDP, from the start or from a folder."""
    plugin = FullyShardedDataParallelPlugin(
        state_dict_type="SHARDED_STATE_DICT",
        fsdp_version=fsdp,
        auto_wrap_policy="size_based_wrap",
        min_num_params=1000,
        use_orig_params=True,
    )
    accelerator = Accelerator(fsdp_plugin=plugin if fsdp else None)
    model = make_model()
    optimizer = SM3.adamw_like(model.named_parameters(), lr=2e-3, momentum_dtype=torch.int8)
    loader = DataLoader(make_data(), batch_size=BATCH)
    model, prepared, loader = accelerator.prepare(model, optimizer, loader)
    if fsdp == 1:
        optimizer.attach(model)  # FSDP1 flattens the parameters: their shapes are read in the wrapped model
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if resume is not None:
        accelerator.load_state(str(resume))
        loader = accelerator.skip_first_batches(loader, progress.step)
    for inputs, labels in islice(loader, steps - progress.step):
        loss = loss_of(model, inputs, labels)
        accelerator.backward(loss)
        if clip is not None:
            accelerator.clip_grad_norm_(model.parameters(), clip)
        prepared.step()
        prepared.zero_grad()
        progress.step += 1
        accelerator.print(f"step {progress.step}: loss {loss.item():.4f}")
    if save is not None:
        accelerator.save_state(str(save))
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--fsdp", type=int, choices=(1, 2), help="left out: DistributedDataParallel")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--resume", type=Path)
    train(**vars(parser.parse_args()))
