"""The planner's decoders and its command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sm3_dist
from sm3_dist.__main__ import main as command_of_the_package
from sm3_dist.planner.collective_volume import SENT
from sm3_dist.planner.command import MUON_LIKE, VARIANTS, main, parsers
from sm3_dist.planner.decoder import MODELS, Decoder, read_config
from sm3_dist.planner.other_optimizers import BASELINES

PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "llama-2-7b": 6_738_415_616,
    "mixtral-8x7b": 46_702_792_704,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "phi-3-mini": 3_821_079_552,
    "pythia-6.9b": 6_857_302_016,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_419_200 - 58 * 256,  # without the biases of its routers, which have no gradient
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_as_many_parameters_as_published(name: str) -> None:
    with torch.device("meta"):
        model = Decoder(MODELS[name])
    assert sum(param.numel() for param in model.parameters()) == PUBLISHED[name]
    ranks = sm3_dist.plan(model, world=4, wrapper="tp", tensor_parallel=model.tensor_parallel)
    assert 4 * PUBLISHED[name] <= sum(rank.weights for rank in ranks) < 4 * 1.1 * PUBLISHED[name]


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
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
    assert "248.88 MB   248.88 MB   497.76 MB   995.52 MB   154.39 MB    746.64 MB          0 B" in rows["adamw"]
    assert "124.44 MB    39.39 MB" in rows["sm3-bf16"], "of gradients those of the embeddings"
    assert set(rows) == {"on", *VARIANTS, MUON_LIKE, *BASELINES}


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
        (["--config", '{"model_type": "abacus"}'], "only those of gpt2, gpt_neox"),
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
    assert message in said(capsys, *arguments)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says of a mistake, in one line."""
    with pytest.raises(SystemExit) as caught:
        main(["plan", *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--cover-block -4", "cover_block must be an integer of at least 1 (or None), but is -4"),
        ("--cover-block 0", "cover_block must be an integer of at least 1"),
        ("--momentum 1.5", "momentum must be at least 0 and less than 1.0, but is 1.5"),
        ("--momentum nan", "momentum must be"),
        ("--update-rms 0", "update_rms must be greater than 0"),
        ("--world 0", "world must be at least 1 and at most 1,000,000, but is 0"),
        ("--world 4 --wrapper ddp --tp-size 2", "tp_size=2 with wrapper='ddp': tensor parallelism goes together with"),
        ("--world 4 --wrapper fsdp2 --tp-size 3", "tp_size=3 must divide the 4 ranks"),
        ("--world 4 --wrapper hsdp --tp-size 4", "tp_size=4 must divide the 2 ranks of a replica"),
        ("--world 4 --wrapper tp --tp-size 2", "over all 4 ranks; leave it out"),
        ("--dtype float8", "invalid choice: 'float8'"),
    ],
)
def test_what_sm3_refuses_is_refused(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in said(capsys, "--model", "gpt2-124m", *arguments.split())


def test_a_size_may_have_a_unit(capsys: pytest.CaptureFixture[str]) -> None:
    counts = set()
    for size in ("124M", "0.124b", "1.24e8"):
        main(["plan", "--params", size, "--optimizer", "adamw"])
        counts.add(int(capsys.readouterr().out.split(" parameters")[0].replace(",", "")))
    assert len(counts) == 1
    assert counts.pop() == pytest.approx(124e6, rel=0.1)
    assert "'7X' is no number of parameters" in said(capsys, "--params", "7X")
    assert "must be between" in said(capsys, "--params", "nan")


def test_a_callable_that_wants_arguments_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert "torch.nn:Linear is called without arguments, and raised TypeError" in said(capsys, "torch.nn:Linear")


def test_the_version_and_the_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["sm3_dist", "--version"])
    with pytest.raises(SystemExit, match="0"):
        command_of_the_package()
    assert capsys.readouterr().out == f"sm3_dist {sm3_dist.__version__}\n"
    _, command = parsers("")
    assert [action.dest for action in command._actions if not action.help] == []


def test_tensor_parallel_divides_what_fsdp2_gathers(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model without odd sizes a rank of 4 x 2 holds an eighth, and gathers half."""
    options = ["--model", "mistral-7b", "--world", "8", "--wrapper", "fsdp2", "--optimizer", "adamw"]
    for tp_size in ([], ["--tp-size", "2"]):
        main(["plan", *options, *tp_size])
    whole, half = (line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("adamw"))
    assert whole[1:3] == ["3.62", "GB"]
    assert half[1:3] == ["3.62", "GB"]
    assert float(half[11]) / float(whole[11]) == pytest.approx(0.5 * (3 / 4) / (7 / 8), rel=0.01)
