"""transformers.Trainer: python docs/examples/transformers_trainer.py --save run/trainer; or torchrun, for DDP."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sm3_dist import AdamWLikeSM3


def make_model() -> nn.Module:
    """A language model too small to be of use."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=72,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


class Counting(Dataset):
    """Windows of numbers in order, from random starts."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (index * 37 + torch.arange(16)) % 100
        return {"input_ids": tokens, "labels": tokens}


class FSDP1Trainer(Trainer):
    """For FSDP1, which flattens parameters: SM3 reads their shapes in the wrapped model."""

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Called with the wrapped model. All parameters are in one group: all have the weight decay of the options."""
        optimizer_class, options = self.optimizer_cls_and_kwargs
        self.optimizer = optimizer_class(model.named_parameters(), **options, model=model)
        return self.optimizer


def train(steps: int, save: Path, resume: bool = False, clip: float = 1.0, **options: Any) -> nn.Module:
    """Train up to step number ``steps``, from the start or from the last checkpoint in the folder.

    ``options`` are further arguments of ``TrainingArguments``.
    """
    arguments = TrainingArguments(
        output_dir=str(save),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=2e-3,  # for the schedule; the optimizer has its own
        weight_decay=0.1,
        max_grad_norm=clip,
        save_strategy="steps",
        save_steps=steps,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        **options,
    )
    fsdp1 = (options.get("fsdp_config") or {}).get("version") == 1
    trainer = (FSDP1Trainer if fsdp1 else Trainer)(
        model=make_model(),
        args=arguments,
        train_dataset=Counting(),
        optimizer_cls_and_kwargs=(AdamWLikeSM3, {"lr": 2e-3, "momentum_dtype": torch.int8}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--save", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    train(**vars(parser.parse_args()))
