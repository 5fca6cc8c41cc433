"""Lightning: python docs/examples/lightning_ddp.py --save run/lightning.ckpt."""

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sm3_dist import SM3

BATCH = 8  # per rank


class Module(lightning.LightningModule):
    """A small classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 192), nn.GELU(), nn.Linear(192, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """The loss of one batch."""
        inputs, labels = batch
        return nn.functional.cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self) -> SM3:
        """SM3 for all parameters, by name; under FSDPStrategy, which flattens them, it must know the wrapped model."""
        model = self.trainer.model
        return SM3.adamw_like(self.named_parameters(), lr=2e-3, momentum_dtype=torch.bfloat16, model=model)


def make_data() -> TensorDataset:
    """The same on every rank; Lightning deals it out."""
    random = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(48, 32, generator=random), torch.randint(10, (48,), generator=random))


def train(epochs: int, save: Path | None = None, resume: Path | None = None, **options: Any) -> nn.Module:
    """Train up to the end of epoch number ``epochs``, from the start or from a file.

    ``options`` go to ``lightning.Trainer``: ``devices``, ``strategy``, ``precision``, ``gradient_clip_val``, …
    """
    trainer = lightning.Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False, **options
    )
    module = Module()
    trainer.fit(module, DataLoader(make_data(), batch_size=BATCH), ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--resume", type=Path)
    train(**vars(parser.parse_args()), precision="bf16-mixed", gradient_clip_val=1.0)
