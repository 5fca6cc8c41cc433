"""The plan of bytes against bytes that were measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from flat_layouts import fsdp1, wrap_fairscale
from harness import Pool
from layouts import LAYOUTS, SHAPES, Tensors
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import sm3_dist
from sm3_dist import SM3
from sm3_dist.planner.collective_volume import SENT
from sm3_dist.planner.command import VARIANTS, main
from sm3_dist.planner.decoder import MODELS, Decoder, read_config
from sm3_dist.planner.other_optimizers import RIVALS
from sm3_dist.planner.planning import RankBytes
from sm3_dist.ranks.bucket import MaxBucket

OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9, "momentum_dtype": torch.bfloat16, "update_rms": 0.2},
    {"momentum": 0.9, "momentum_dtype": torch.int8, "cover_block": 2},
]
SEVERAL = [*SHAPES, (64, 48), (300, 7)]


def count(tensors: Any) -> int:
    plain = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in plain if t.untyped_storage().nbytes())


WRAP: dict[str, Callable[[Tensors], nn.Module]] = {
    "fsdp2": fully_shard,
    "hsdp": LAYOUTS["hsdp"].wrap,
    "tp": LAYOUTS["tp"].wrap,
    "fsdp1": lambda module: fsdp1(module, auto_wrap_policy=by_block, use_orig_params=True),
    "fairscale": wrap_fairscale(nested=True),
}


def by_block(module: nn.Module, recurse: bool, **_: Any) -> bool:
    return recurse or isinstance(module, nn.ParameterList)


def model(dtype: torch.dtype, wrapper: str) -> Tensors:
    module = Tensors(SEVERAL, dtype)
    if wrapper not in ("fairscale", "tp"):  # the one wants all or none, the other makes new ones
        next(module.parameters()).requires_grad_(False)
    return module


def given(wrapper: str, module: Tensors) -> dict[str, Any]:
    """What the plan must be told of the wrapper."""
    told: dict[str, Any] = {"world": dist.get_world_size(), "wrapper": wrapper.removesuffix("-covers")}
    if wrapper.endswith("-covers"):
        told["shard_covers"] = True
    if wrapper == "tp":
        named = enumerate(module.named_parameters())
        told["tensor_parallel"] = {name: [0, p.dim() - 1][k % 3] for k, (name, p) in named if k % 3 < 2}
    if told["wrapper"] in ("fsdp1", "fairscale"):
        told["units"] = list(module.blocks)
    return told


def measured(module: nn.Module, told: dict[str, Any], options: dict[str, Any]) -> RankBytes:
    module = WRAP.get(told["wrapper"], lambda module: module)(module)
    keywords: dict[str, Any] = {"shard_over": dist.group.WORLD} if told["wrapper"] == "zero1" else {}
    keywords["shard_covers"] = told.get("shard_covers", False)
    optimizer = SM3(module.parameters(), model=module, **options, **keywords)
    trained = [param for param in module.parameters() if param.requires_grad]
    for param in trained:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    buckets = [bucket for bucket in optimizer._current_plan().buckets if isinstance(bucket, MaxBucket)]
    state = [value for each in optimizer._keeper.states.values() for value in each.values()]  # covers left sharded
    state += [bucket._owned for bucket in buckets if bucket._owned is not None]
    state += [cover.working for entry in optimizer._current_plan().entries for cover in entry.cut_covers]
    sent, kept = sum(bucket.numel * bucket.dtype.itemsize for bucket in buckets), count(state)
    sent += count(exchange._lent for exchange in optimizer._current_plan().exchanges)
    optimizer.state  # noqa: B018  # the collectives of this step end before the next begin
    moments = torch.optim.AdamW(trained, foreach=False)
    moments.step()
    adam = [value for each in moments.state.values() for key, value in each.items() if "exp_avg" in key]
    return RankBytes(count(module.parameters()), count(param.grad for param in trained), kept, sent, count(adam))


def compare(wrapper: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64)[: 1 if wrapper == "fairscale" else 3]:  # its only one
        for options in OPTIONS:
            module = model(dtype, wrapper)
            told = given(wrapper, module)
            expected = sm3_dist.plan(module, **told, **options)[dist.get_rank()]
            found = measured(module, told, options)
            names = ["weights", "gradients", "state", "sent"] + ["adam_moments"] * (told["wrapper"] != "zero1")
            for name in names:
                assert getattr(found, name) == getattr(expected, name), (wrapper, dtype, options, name)


@pytest.mark.parametrize(
    ("wrapper", "world_size"),
    [
        *(("none", 1), ("ddp", 2), ("zero1", 2), ("zero1", 3), ("zero1-covers", 3)),
        *(("fsdp2", 1), ("fsdp2", 3), ("fsdp2-covers", 3), ("hsdp", 4), ("tp", 3)),
        *(("fsdp1", 3), ("fsdp1-covers", 3), ("fairscale", 2)),
    ],
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wrapper": "abacus"}, "wrapper must be one of"),
        ({"world": 2}, "wrapper='none'"),
        ({"world": 0, "wrapper": "ddp"}, "wrapper='ddp'"),
        ({"world": 4, "wrapper": "hsdp", "replicas": 3}, "4 ranks cannot hold 3 replicas"),
        ({"world": 2, "wrapper": "tp"}, "needs tensor_parallel="),
        ({"world": 2, "wrapper": "tp", "tensor_parallel": {"bias": 1}}, "cuts 'bias' in dimension 1"),
        ({"world": 2, "wrapper": "tp", "tensor_parallel": {"beads": 0}}, "no parameter of that name"),
        ({"world": 2, "wrapper": "ddp", "step_in_backward": True}, "no steps can be taken during backward"),
        ({"world": 2, "wrapper": "fsdp2", "step_in_backward": True, "shard_covers": True}, "with shard_covers"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sm3_dist.plan(torch.nn.Linear(2, 2), **arguments)


def test_gradients_in_backward_are_those_of_one_unit() -> None:
    """Which are whole parameters without FSDP2."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 2))
    in_backward = {"step_in_backward": True}
    assert sm3_dist.plan(module, **in_backward)[0].gradients == 4 * 32
    sharded = {"wrapper": "fsdp2", "world": 2, **in_backward}
    assert sm3_dist.plan(module, **sharded)[0].gradients == 4 * (20 + 40 + 18) // 2
    assert sm3_dist.plan(module, **sharded, units=[module[1]])[0].gradients == 4 * 40 // 2


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (MODELS["gpt2-124m"], 124_439_808),
        (MODELS["llama-2-7b"], 6_738_415_616),
        # The values of config.json of Qwen2-7B and Qwen3-0.6B, whose embedding is tied.
        (("qwen2", 3584, 28, 18944, 28, 4, 152064, None, False), 7_615_616_512),
        (("qwen3", 1024, 28, 3072, 16, 8, 151936, 128, True), 596_049_920),
    ],
    ids=lambda value: f"{value:,}" if isinstance(value, int) else "",
)
def test_decoders_have_as_many_parameters_as_published(config: Any, parameters: int, tmp_path: Path) -> None:
    if isinstance(config, tuple):
        names = "model_type hidden_size num_hidden_layers intermediate_size num_attention_heads num_key_value_heads"
        (tmp_path / "config.json").write_text(
            json.dumps(
                dict(zip([*names.split(), "vocab_size", "head_dim", "tie_word_embeddings"], config, strict=True))
            )
        )
        config = read_config(tmp_path / "config.json")
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sum(param.numel() for param in decoder.parameters()) == parameters
    ranks = sm3_dist.plan(decoder, world=4, wrapper="tp", tensor_parallel=decoder.tensor_parallel)
    assert 4 * parameters <= sum(rank.weights for rank in ranks) < 4 * 1.03 * parameters


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


def test_the_command_line_compares_optimizers(capsys: pytest.CaptureFixture[str]) -> None:
    """124,439,808 parameters on 2 ranks: AdamW has 16 bytes of each in all, and FSDP2 moves all of them three times."""
    main(["plan", "--model", "gpt2-124m", "--world", "2", "--wrapper", "fsdp2"])
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[8:] if line}
    assert "248.88 MB   248.88 MB   497.76 MB   995.52 MB     746.64 MB           0 B" in rows["adamw"]
    assert "124.44 MB    39.39 MB" in rows["sm3-bf16"], "of gradients those of the embeddings"
    assert set(rows) == {"on", *VARIANTS, *RIVALS}


@pytest.mark.parametrize(
    ("wrapper", "world", "replicas", "sent"),
    [("none", 1, 1, 0), ("ddp", 4, 1, 90), ("zero1", 4, 1, 135), ("fsdp2", 4, 1, 195), ("hsdp", 4, 2, 160)],
)
def test_what_a_wrapper_sends(wrapper: str, world: int, replicas: int, sent: int) -> None:
    formula = SENT[wrapper]
    assert formula is not None
    assert formula(100, 60, world, replicas) == sent


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torch.nn"], "MODULE:CALLABLE"),
        (["torch.nn:Abacus"], "no attribute 'Abacus'"),
        (["no_such_module:Model"], "No module named"),
        (["torch:Generator"], "not a torch.nn.Module"),
        (["torch.nn:Transformer", "--world", "2"], "name how they share the work"),
        (["torch.nn:Transformer", "--unit", "Bead"], "no submodule of class Bead; it has"),
        (["torch.nn:Transformer", "--params", "7e9"], "not allowed with argument"),
        ([], "one of the arguments"),
        (["--params", "7"], "must be between 2e+07 and 1e+13"),
        (["--config", "none.json"], "cannot read none.json"),
        (["--config", __file__], "is not JSON"),
        (["--config", "[]"], "must hold a JSON object"),
        (["--config", '{"model_type": "mixtral"}'], "only those of gpt2, llama"),
        (["--config", '{"model_type": "gpt2"}'], "has no n_embd"),
        (["--config", '{"model_type": "gpt2", "n_embd": "wide"}'], "n_embd must be a positive integer, but is 'wide'"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if arguments[-1:] and arguments[-1][0] in "[{":
        (tmp_path / "config.json").write_text(arguments[-1])
        arguments = ["--config", str(tmp_path / "config.json")]
    with pytest.raises(SystemExit):
        main(["plan", *arguments])
    assert message in capsys.readouterr().err
