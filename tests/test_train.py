"""The training job: its real entry point, and its layouts against one process."""

from __future__ import annotations

import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Pool
from rich.console import Console
from training import FAST, figures, torchrun

from launch.job.command_line import parse
from launch.job.recipe import adamw_bytes, count_bytes, state_bytes
from launch.job.report import Bar
from launch.job.world import UserError, World
from launch.train import Run, main


def test_two_processes_train_and_a_second_run_does_not_touch_the_first(
    workers: Pool, tmp_path: Path, text: Path
) -> None:
    out = tmp_path / "run"
    first = torchrun("--data", text, "--out", out)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("sm3 (muon-like) after 12 steps") == 1, "rank 0 alone speaks"
    said = [line for line in first.stdout.splitlines() if not line.startswith("[Gloo]")]  # as it does up to PyTorch 2.9
    assert said[0].startswith(f"text: {text}: ")
    assert said[1].startswith("sm3 (muon-like) trains tiny, ")
    for said in ("bits per byte", "order-0", "order-1", "bz2", "AdamW would hold", "in the optimizer", "tokens/s"):
        assert said in first.stdout
    for said in ("judging on the 3,000 bytes held out", f"config.json, metrics.jsonl and loss.png are in {out}"):
        assert said in first.stdout.replace("\n", " ")
    config = json.loads((out / "config.json").read_text())
    assert (config["world_size"], config["parallel"], config["optimizer"], config["lr"]) == (2, "fsdp2", "sm3", 0.01)
    assert (config["recipe"], config["momentum"]) == ("muon-like", 0.95)
    *training, final = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in training] == [10, 12]
    assert final["validation_bits_per_byte"] == pytest.approx(final["validation_loss"] / math.log(2))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")

    before = {file: file.read_bytes() for file in out.iterdir()}
    again = f"{FAST} --out {out} --seed 1"
    workers(2).run_raises(UserError, figures, again, text, match="already holds a run")
    assert {file: file.read_bytes() for file in out.iterdir()} == before


def test_one_process_without_torchrun_overwrites_only_its_own_files(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("an old run")
    (tmp_path / "notes.txt").write_text("keep me")
    arguments = [*FAST.split(), "--data", str(text), "--out", str(tmp_path), "--schedule", "cosine"]
    assert main(arguments) == 2
    assert "already holds a run (config.json)" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert json.loads((tmp_path / "config.json").read_text())["world_size"] == 1
    assert (tmp_path / "notes.txt").read_text() == "keep me"
    rates = [json.loads(line).get("lr") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates[1] == pytest.approx(0.01 * (1 + math.cos(math.pi * 10 / 11)) / 2)  # of step 12, after 1 of warm-up


# ---------------------------------------------------------------------------------------- layouts against one process


OPTIMIZERS = {"sgd": "--optimizer sgd --lr 0.3", "sm3": "--optimizer sm3"}


@pytest.fixture(scope="module")
def alone(workers: Pool, text: Path) -> dict[str, dict[str, Any]]:
    """What one process gets, by optimizer. SGD shows wrong scales of the gradient, SM3 wrong accumulators."""
    runs = OPTIMIZERS | {"adamw-like": "--recipe adamw-like"}
    return {name: workers(1).run(figures, f"{FAST} {optimizer}", text)[0] for name, optimizer in runs.items()}


LAYOUTS = [
    (1, "fsdp2"),
    (2, "ddp"),
    (2, "fsdp2"),
    (2, "hsdp"),
    (2, "fsdp1"),
    (2, "fsdp1-flat --reshard"),
    (2, "fairscale"),
    (2, "oss"),
    (2, "tp"),
    (4, "fsdp2 --reshard"),
    (4, "hsdp --replicas 2"),
    (4, "fsdp1"),
    (4, "fairscale --reshard"),
    (4, "tp --tp-size 2"),
]


@pytest.mark.sampled(
    "layout, optimizer",
    list(itertools.product(LAYOUTS, OPTIMIZERS)),
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else value,
)
def test_every_layout_trains_like_one_process(
    workers: Pool, text: Path, alone: dict[str, dict[str, Any]], layout: tuple[int, str], optimizer: str
) -> None:
    size, parallel = layout
    results = workers(size).run(figures, f"{FAST} {OPTIMIZERS[optimizer]} --parallel {parallel}", text)
    losses = [result["validation_loss"] for result in results]
    assert losses == [losses[0]] * size
    flat = parallel.startswith(("fsdp1-flat", "fairscale"))
    expected = alone["adamw-like" if flat and optimizer == "sm3" else optimizer]["validation_loss"]
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert losses[0] < math.log(256) - 0.5  # it has learnt something


def test_zero1_trains_exactly_like_ddp(workers: Pool, text: Path) -> None:
    ddp = workers(2).run(figures, f"{FAST} --parallel ddp", text)[0]
    zero1 = workers(2).run(figures, f"{FAST} --parallel zero1", text)[0]
    assert zero1["validation_loss"] == ddp["validation_loss"]
    assert 0.5 <= zero1["state_bytes_per_rank"] / ddp["state_bytes_per_rank"] < 0.52


def test_sharding_divides_the_state(workers: Pool, text: Path, alone: dict[str, dict[str, Any]]) -> None:
    result = workers(2).run(figures, f"{FAST} --parallel fsdp2", text)[0]
    assert result["adamw_bytes_per_rank"] == alone["sm3"]["adamw_bytes_per_rank"] / 2
    assert result["state_bytes_per_rank"] < 0.6 * result["adamw_bytes_per_rank"]


IN_BACKWARD = "--steps 6 --dtype bfloat16 --clip inf --momentum-dtype int8"


def used_in_backward(data: Path, *runs: str) -> list[tuple[float, list[bool]]]:
    """Train some runs; of each the validation loss, and of every step whether it found no gradient left to use."""
    return [used_in_one(arguments, data) for arguments in runs]


def used_in_one(arguments: str, data: Path) -> tuple[float, list[bool]]:
    run = Run(parse([*FAST.split(), *arguments.split(), "--data", str(data)]), World.current(), Console(quiet=True))
    parameters, used = list(run.model.parameters()), []
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    run.optimizer.register_step_pre_hook(lambda *_: used.append(all(p.grad is None for p in parameters)))
    run.learn()
    return run.judge(), used


@pytest.mark.parametrize(("size", "parallel"), [(1, "none"), (2, "fsdp2 --reshard"), (2, "tp"), (4, "hsdp")])
def test_bfloat16_trains_in_backward_as_after_it(workers: Pool, text: Path, size: int, parallel: str) -> None:
    """In every layout that has it: the same weights to the last bit, and no gradient is left."""
    common = f"{IN_BACKWARD} --parallel {parallel}"
    runs = (f"{common} --recipe adamw-like", f"{common} --step-in-backward")
    (after, left), (during, used) = workers(size).run(used_in_backward, text, *runs)[0]
    assert (during, used, left) == (after, [True] * 6, [False] * 6)
    assert during < math.log(256) - 0.2


def test_rounding_is_stochastic_unless_told_otherwise(workers: Pool, text: Path) -> None:
    runs = [f"{IN_BACKWARD} {rounding}" for rounding in ("", "--rounding stochastic", "--rounding nearest")]
    losses = [loss for loss, _ in workers(1).run(used_in_backward, text, *runs)[0]]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_on_a_terminal_and_in_a_log(terminal: bool) -> None:
    written = io.StringIO()
    with Bar(Console(file=written, force_terminal=terminal, width=120), steps=1000) as bar:
        for step in range(10, 1010, 10):
            bar.show(step, train_bits_per_byte=4.5, lr=1e-3, tokens_per_second=12345.6)
    assert "loss 4.500 bits  lr 1.00e-03  12,346 tokens/s" in written.getvalue()
    assert terminal or len(written.getvalue().splitlines()) == 20
    assert "1000/1000" in written.getvalue()


def test_state_is_counted_in_bytes_of_this_rank() -> None:
    weights = [torch.nn.Parameter(torch.zeros(3, 5)), torch.nn.Parameter(torch.zeros(7, dtype=torch.bfloat16))]
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert adamw_bytes(optimizer) == 2 * (15 * 4 + 7 * 2)
    assert state_bytes(optimizer) == adamw_bytes(optimizer) + 2 * 4  # AdamW counts the steps of each weight
    assert count_bytes({"a": [torch.zeros(2), (torch.zeros(3),)], "b": 7}) == 20
