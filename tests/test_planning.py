"""The plan of bytes against bytes that were measured."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from layouts import SHAPES, Tensors
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import sm3_dist
from sm3_dist import SM3
from sm3_dist.__main__ import main
from sm3_dist.bucket import MaxBucket
from sm3_dist.planning import RankBytes

OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9, "momentum_dtype": torch.bfloat16, "update_rms": 0.2},
    {"momentum": 0.9, "momentum_dtype": torch.int8, "cover_block": 2},
]
SEVERAL = [*SHAPES, (64, 48), (300, 7)]


def count(tensors: Any) -> int:
    plain = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in plain)


def model(dtype: torch.dtype) -> Tensors:
    module = Tensors(SEVERAL, dtype)
    next(module.parameters()).requires_grad_(False)
    return module


def measured(wrapper: str, dtype: torch.dtype, options: dict[str, Any]) -> RankBytes:
    module = model(dtype)
    keywords = {"shard_over": dist.group.WORLD} if wrapper == "zero1" else {}
    if wrapper == "fsdp2":
        fully_shard(module)
    optimizer = SM3(module.parameters(), **options, **keywords)
    trained = [param for param in module.parameters() if param.requires_grad]
    for param in trained:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    state = [value for each in optimizer.state.values() for value in each.values()]
    buckets = [bucket for bucket in optimizer._current_plan().buckets if isinstance(bucket, MaxBucket)]
    moments = torch.optim.AdamW(trained)
    moments.step()
    adam = [value for each in moments.state.values() for key, value in each.items() if "exp_avg" in key]
    return RankBytes(
        count(module.parameters()),
        count(param.grad for param in trained),
        count(state),
        sum(bucket.numel * bucket.dtype.itemsize for bucket in buckets),
        count(adam),
    )


def compare(wrapper: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for options in OPTIONS:
            planned = sm3_dist.plan(model(dtype), world=dist.get_world_size(), wrapper=wrapper, **options)
            found, expected = measured(wrapper, dtype, options), planned[dist.get_rank()]
            names = ["weights", "gradients", "state", "sent"] + ["adam_moments"] * (wrapper != "zero1")
            for name in names:
                assert getattr(found, name) == getattr(expected, name), (wrapper, dtype, options, name)


@pytest.mark.parametrize(
    ("wrapper", "world_size"), [("none", 1), ("ddp", 2), ("fsdp2", 1), ("fsdp2", 3), ("zero1", 2), ("zero1", 3)]
)
def test_planned_bytes_are_measured_bytes(workers: Pool, wrapper: str, world_size: int) -> None:
    workers(world_size).run(compare, wrapper)


def test_a_model_need_not_exist() -> None:
    """On the meta device it takes no memory."""
    for options in OPTIONS:
        with torch.device("meta"):
            absent = torch.nn.Linear(300, 70)
        there: list[Tensor] = list(torch.nn.Linear(300, 70).parameters())
        module = torch.nn.ParameterList(there)
        assert sm3_dist.plan(absent, world=4, wrapper="fsdp2", **options) == sm3_dist.plan(
            module, world=4, wrapper="fsdp2", **options
        )


@pytest.mark.parametrize("arguments", [{"wrapper": "abacus"}, {"world": 2}, {"world": 0, "wrapper": "ddp"}], ids=str)
def test_bad_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wrapper"):
        sm3_dist.plan(torch.nn.Linear(2, 2), **arguments)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # of the model
def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--world", "4", "--wrapper", "fsdp2", "--dtype", "bfloat16", "--momentum", "0.9", "--cover-block", "32"]
    main(["plan", "torch.nn:Transformer", *options, "--momentum-dtype", "int8"])
    with torch.device("meta"):
        module = torch.nn.Transformer(dtype=torch.bfloat16)
    ranks = sm3_dist.plan(module, world=4, wrapper="fsdp2", momentum=0.9, momentum_dtype=torch.int8, cover_block=32)
    printed = capsys.readouterr().out
    assert printed.startswith("44,140,544 parameters, 4 ranks\n")
    assert f"{sum(rank.state for rank in ranks):,}" in printed
    assert f"{max(rank.state for rank in ranks):,}" in printed


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torch.nn"], "MODULE:CALLABLE"),
        (["torch.nn:Abacus"], "no attribute 'Abacus'"),
        (["no_such_module:Model"], "No module named"),
        (["torch:Generator"], "not a torch.nn.Module"),
        (["torch.nn:Transformer", "--world", "2"], "name how they share the work"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["plan", *arguments])
    assert message in capsys.readouterr().err
