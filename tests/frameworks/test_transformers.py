"""transformers.Trainer, unmodified: it comes to what a plain loop comes to, interrupted or not; LoRA of peft too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate_state import accelerate_anew
from harness import Pool
from plain_loop import differing, number_of_ranks, plain_loop, weights_of, whole_weights
from torch import Tensor, nn

from sm3_dist import SM3, AdamWLikeSM3, MuonLikeSM3

# Not imported here, where it would take seconds of every process that collects tests.
pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="needs pip install 'sm3_dist[frameworks]'")

STEPS, BATCH = 5, 4
OPTIONS = {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant", "disable_tqdm": True}


def as_trainer_groups(model: nn.Module) -> SM3:
    """No decay of biases and norms."""
    flat = {p for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if p not in flat], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p in flat], "weight_decay": 0.0},
    ]
    return AdamWLikeSM3(groups, lr=2e-3, momentum_dtype=torch.int8)


@contextmanager
def trainer_on_cpu(fsdp: int | None) -> Iterator[None]:
    """Have Trainer use the CPU and the process group that is there, if there are several ranks.

    accelerate, which Trainer is made of, refuses FSDP on a CPU, though PyTorch does not. So its ``PartialState`` is
    told that the processes have GPUs, and that the device is the CPU.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    def claim_gpus(state: PartialState, *arguments: Any, **options: Any) -> None:
        as_it_is(state, *arguments, **options)
        if fsdp:
            state.distributed_type, state.device = DistributedType.MULTI_GPU, torch.device("cpu")

    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    as_it_is = PartialState.__init__
    told = patch.dict(os.environ, places if size != "1" or fsdp else {})
    with accelerate_anew(), told, patch.object(PartialState, "__init__", claim_gpus):
        yield


def in_one_group(model: nn.Module) -> SM3:
    return AdamWLikeSM3(model.parameters(), lr=2e-3, momentum_dtype=torch.int8)


def against_a_plain_loop(fsdp: int | None, folder: Path, device: str = "cpu") -> tuple[list[str], list[str]]:
    """Names of weights in which Trainer differs from a plain loop, and when interrupted from uninterrupted."""
    import transformers_trainer as example

    ranks, data = number_of_ranks(), example.Counting()

    def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
        start = (step * ranks + rank) * BATCH
        tokens = torch.stack([data[i]["input_ids"] for i in range(start, start + BATCH)]).to(device)
        return model(input_ids=tokens, labels=tokens).loss

    options = OPTIONS
    if fsdp:  # whose norm of gradients is another in its last bits
        wrapped = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "SHARDED_STATE_DICT"}
        alone = {"sync_module_states": False} if device == "cpu" else {}  # accelerate looks for a GPU to send them with
        options = OPTIONS | {"clip": 0.0, "fsdp": True, "fsdp_config": {"version": fsdp, **wrapped, **alone}}
    clip = None if fsdp else 1.0
    make_optimizer = in_one_group if fsdp == 1 else as_trainer_groups
    expected = plain_loop(example.make_model().train().to(device), make_optimizer, loss_of, ranks, STEPS, clip)

    def trained(steps: int, name: str, **resume: bool) -> dict[str, Tensor]:
        with trainer_on_cpu(fsdp) if device == "cpu" else accelerate_anew():
            return whole_weights(example.train(steps, folder / name, **resume, **options))

    whole = trained(STEPS, "whole")
    if fsdp == 1:  # accelerate loads no optimizer there
        return differing(whole, expected), []
    trained(2, "cut")
    resumed = trained(STEPS, "cut", resume=True)
    return differing(whole, expected), differing(resumed, whole)


@pytest.mark.parametrize(
    ("ranks", "fsdp"), [(1, None), (2, None), (2, 1), (2, 2)], ids=["one", "DDP", "FSDP1", "FSDP2"]
)
def test_trainer_trains_as_a_plain_loop(workers: Pool, tmp_path: Path, ranks: int, fsdp: int | None) -> None:
    assert workers(ranks).run(against_a_plain_loop, fsdp, tmp_path) == [([], [])] * ranks


def orthogonal(model: nn.Module) -> SM3:
    return MuonLikeSM3(model.named_parameters(), lr=2e-3, model=model)


def test_an_optimizer_that_is_made_before_trains_as_a_plain_loop(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments
    from transformers_trainer import Counting, make_model

    def loss_of(model: nn.Module, step: int, _: int) -> Tensor:
        tokens = torch.stack([Counting()[i]["input_ids"] for i in range(step * BATCH, (step + 1) * BATCH)])
        return model(input_ids=tokens, labels=tokens).loss

    model = make_model()
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        **OPTIONS,
    )
    Trainer(model, arguments, train_dataset=Counting(), optimizers=(orthogonal(model), None)).train()
    expected = plain_loop(make_model().train(), orthogonal, loss_of, 1, 3, clip=1.0)
    assert differing(weights_of(model), expected) == []


def with_orthogonal_updates(fsdp: int, folder: Path) -> tuple[list[str], list[str]]:
    """As above; the parameters come with the options, but under FSDP1."""
    import transformers_trainer as example
    from transformers import Trainer, TrainingArguments

    ranks, data = number_of_ranks(), example.Counting()
    options: dict[str, Any] = {"lr": 2e-3, "weight_decay": 0.1, "momentum_dtype": torch.int8}

    def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
        start = (step * ranks + rank) * BATCH
        tokens = torch.stack([data[i]["input_ids"] for i in range(start, start + BATCH)])
        return model(input_ids=tokens, labels=tokens).loss

    def optimizer_of(model: nn.Module) -> SM3:
        return MuonLikeSM3(model.named_parameters(), **options, model=model if fsdp == 1 else None)

    wrapped = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "SHARDED_STATE_DICT"}
    config = {"version": fsdp, **wrapped, "sync_module_states": False}
    told = OPTIONS | {"per_device_train_batch_size": BATCH, "max_grad_norm": 0.0, "report_to": "none"}
    told |= {"fsdp": True, "fsdp_config": config, "use_cpu": True}

    def trained(steps: int, name: str, resume: bool = False) -> dict[str, Tensor]:
        with trainer_on_cpu(fsdp):
            arguments = TrainingArguments(str(folder / name), max_steps=steps, save_steps=steps, **told)
            model = example.make_model()
            given = options if fsdp == 1 else options | {"params": list(model.named_parameters())}
            trainer = (example.FSDP1Trainer if fsdp == 1 else Trainer)(
                model, arguments, train_dataset=data, optimizer_cls_and_kwargs=(MuonLikeSM3, given)
            )
            trainer.train(resume_from_checkpoint=resume)
            return whole_weights(trainer.model)

    expected = plain_loop(example.make_model().train(), optimizer_of, loss_of, ranks, STEPS)
    whole = trained(STEPS, "whole")
    if fsdp == 1:  # accelerate loads no optimizer there
        return differing(whole, expected), []
    trained(2, "cut")
    return differing(whole, expected), differing(trained(STEPS, "cut", resume=True), whole)


@pytest.mark.parametrize("fsdp", [1, 2])
def test_orthogonal_updates_under_fsdp(workers: Pool, tmp_path: Path, fsdp: int) -> None:
    assert workers(2).run(with_orthogonal_updates, fsdp, tmp_path) == [([], [])] * 2


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads it, transformers warns
def test_lora_through_trainer_has_state_for_adapters_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs pip install 'sm3_dist[frameworks]'")
    from transformers import Trainer, TrainingArguments
    from transformers_trainer import Counting, make_model

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model(), config)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    arguments = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    recipe = (AdamWLikeSM3, {"lr": 1e-3, "momentum_dtype": torch.int8})
    trainer = Trainer(model, arguments, train_dataset=Counting(), optimizer_cls_and_kwargs=recipe)
    trainer.train()
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    adapters = {name for name, param in model.named_parameters() if param.requires_grad}
    assert moved == adapters
    assert all("lora_" in name for name in adapters)
    assert set(trainer.optimizer.state) == {param for param in model.parameters() if param.requires_grad}
