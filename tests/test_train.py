"""The training job: its real entry point, its layouts against one process, and its errors."""

from __future__ import annotations

import doctest
import importlib
import io
import itertools
import json
import math
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from harness import JOBS, Pool
from rich.console import Console

import launch
from launch.job import capacity
from launch.job.command_line import parse
from launch.job.model import GPT, PRESETS
from launch.job.options import Options
from launch.job.recipe import adamw_bytes, build, chosen, count_bytes, schedule, settings, state_bytes
from launch.job.report import Bar
from launch.job.world import UserError, World
from launch.train import Run, main

TRAIN = Path(launch.__file__).parent / "train.py"
# A run of about a second on one process; clipping is in force at every step.
FAST = "--model tiny --steps 12 --batch-size 8 --seq-len 32 --lr 0.01 --clip 0.5 --held-out-bytes 3000 --device cpu"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus."""
    root = tmp_path_factory.mktemp("text")
    for number in range(40):
        (root / f"{number}.txt").write_text(f"The {number}th file says: {number * number} is a square number.\n" * 40)
    return root


def figures(arguments: str, data: Path) -> dict[str, Any]:
    """Train in the process group that there is; return the final figures."""
    run = Run(parse([*arguments.split(), "--data", str(data)]), World.current(), Console(quiet=True))
    run.learn()
    return run.conclude(run.judge())


# ------------------------------------------------------------------------------------------------ the entry point


def torchrun(*arguments: str | Path, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), str(TRAIN)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    JOBS[2] += 1
    return subprocess.run(
        [*command, *FAST.split(), *map(str, arguments)], capture_output=True, text=True, timeout=120, env=environment
    )


def test_two_processes_train_and_a_second_run_does_not_touch_the_first(
    workers: Pool, tmp_path: Path, text: Path
) -> None:
    out = tmp_path / "run"
    first = torchrun("--data", text, "--out", out)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("sm3 after 12 steps") == 1, "rank 0 alone speaks"
    assert first.stdout.startswith(f"text: {text}: ")
    for said in (
        f"loss.png are in {out}",
        "judging on the 3,000 bytes held out",
        "bits per byte",
        "order-0",
        "order-1",
        "bz2",
        "AdamW would hold",
        "in the optimizer",
        "tokens/s",
    ):
        assert said in first.stdout
    config = json.loads((out / "config.json").read_text())
    assert (config["world_size"], config["parallel"], config["optimizer"], config["lr"]) == (2, "fsdp2", "sm3", 0.01)
    *training, final = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in training] == [10, 12]
    assert final["validation_bits_per_byte"] == pytest.approx(final["validation_loss"] / math.log(2))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")

    before = {file: file.read_bytes() for file in out.iterdir()}
    again = f"{FAST} --out {out} --seed 1"
    workers(2).run_raises(UserError, figures, again, text, match="already holds a run")
    assert {file: file.read_bytes() for file in out.iterdir()} == before


def test_a_mistake_is_not_restarted_and_its_line_is_the_last(text: Path) -> None:
    done = torchrun("--data", text, "--lr", "nan", restarts=50)
    line = "error: --lr nan must be at least 0 and less than inf"
    assert done.returncode == 1
    assert done.stderr.count(line) == 2, done.stderr  # when it was found, and at the end
    assert done.stderr.splitlines()[-1] == line
    assert "[rank" not in done.stderr, "ranks leave together, without a traceback"


def test_a_process_leaves_without_finalizing_the_interpreter() -> None:
    script = (
        "import atexit, launch.job.leaving as l; atexit.register(print, 'finalized'); print('said', end=''); l.leave(3)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=TRAIN.parents[1])
    assert (done.returncode, done.stdout) == (3, "said")


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
    return {name: workers(1).run(figures, f"{FAST} {optimizer}", text)[0] for name, optimizer in OPTIMIZERS.items()}


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
    assert losses[0] == pytest.approx(alone[optimizer]["validation_loss"], rel=1e-4)
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


def used_in_backward(arguments: str, data: Path) -> tuple[float, list[bool]]:
    """Train; the validation loss, and of every step whether it found no gradient left to use."""
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
    after, left = workers(size).run(used_in_backward, common, text)[0]
    during, used = workers(size).run(used_in_backward, f"{common} --step-in-backward", text)[0]
    assert (during, used, left) == (after, [True] * 6, [False] * 6)
    assert during < math.log(256) - 0.2


def test_rounding_is_stochastic_unless_told_otherwise(workers: Pool, text: Path) -> None:
    losses = [
        workers(1).run(used_in_backward, f"{IN_BACKWARD} {rounding}", text)[0][0]
        for rounding in ("", "--rounding stochastic", "--rounding nearest")
    ]
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


# ----------------------------------------------------------------------------------------------------------- the model


def test_gpt2_has_the_size_of_gpt2() -> None:
    assert PRESETS["gpt2"].count(seq_len=1024) == 124_439_808


def test_the_model_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    model = GPT(PRESETS["tiny"], seq_len=16)
    text = torch.randint(256, (2, 16))
    changed = text.clone()
    changed[:, 10] = (text[:, 10] + 1) % 256
    before, after = model(text), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert (before[:, 10:] != after[:, 10:]).any(-1).all()


def test_it_starts_without_knowing_anything() -> None:
    torch.manual_seed(0)
    model = GPT(PRESETS["small"], seq_len=16)
    inputs = torch.randint(256, (4, 16))
    loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), torch.randint(256, (64,)))
    assert loss.item() == pytest.approx(math.log(256), abs=0.2)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps many", "argument --steps: invalid int value: 'many'"),
        ("--optimizer adam", "invalid choice: 'adam'"),
        ("--stpes 3", "unrecognized arguments: --stpes 3"),
        ("--steps 0", "--steps 0 must be at least 1"),
        ("--seq-len -1", "--seq-len -1 must be at least 1"),
        ("--tp-size 0", "--tp-size 0 must be at least 1"),
        ("--seed -1", "--seed -1 must be at least 0"),
        ("--clip 0", "--clip 0.0 must be greater than 0"),
        ("--clip nan", "--clip nan must be greater than 0"),
        ("--momentum 1", "--momentum 1.0 must be at least 0 and less than 1.0"),
        ("--lr nan", "--lr nan must be at least 0"),
        ("--optimizer sgd --beta 0.5", "--optimizer sgd has no beta"),
        ("--optimizer adafactor --momentum 0.5", "--optimizer adafactor has no momentum"),
        ("--optimizer adafactor --parallel fsdp2", "cannot update sharded tensors"),
        ("--data /nowhere/at/all", "--data /nowhere/at/all: no such file or directory"),
        ("--seq-len 3000", "--seq-len 3000 needs at least 3001 bytes to hold out, and there are 3000"),
        ("--parallel hsdp --replicas 2", "1 is not a multiple of 2"),
        ("--parallel tp --tp-size 2", "--tp-size 2 does not divide the 1 ranks"),
        ("--out /dev/null/run", "--out /dev/null/run cannot be written to"),
        ("--optimizer sgd --momentum-dtype bfloat16", "--optimizer sgd has no momentum_dtype"),
        ("--optimizer adamw --rounding nearest", "--optimizer adamw has no rounding"),
        ("--step-in-backward", "is used and freed before the next is there. Pass --clip-value"),
        ("--clip-value 1", "is for --step-in-backward"),
        ("--step-in-backward --clip inf --optimizer adamw", "and --optimizer adamw uses another"),
        ("--step-in-backward --clip inf --parallel oss", "and --parallel oss uses another"),
        ("--step-in-backward --clip inf --parallel ddp", "DistributedDataParallel, which averages gradients"),
        ("--step-in-backward --clip inf --parallel zero1", "DistributedDataParallel, which averages gradients"),
        ("--step-in-backward --clip inf --parallel fsdp1", "FullyShardedDataParallel (FSDP1 or fairscale's)"),
        ("--step-in-backward --clip inf --parallel fairscale", "FullyShardedDataParallel (FSDP1 or fairscale's)"),
        ("--model 6.7b --batch-size 8", "--model 6.7b needs at least 79."),
        ("--lr 1e30 --clip inf --optimizer sgd", "pass a lower --lr than 1e+30"),
    ],
)
def test_mistakes_are_explained(arguments: str, message: str, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [] if "--data" in arguments else ["--data", str(text)]
    assert main([*FAST.split(), *data, *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "world", "expected"),  # bytes of weights, gradients and state on each rank, for 1,000 parameters
    [
        ("", World(), (4000, 4000, 4000)),
        ("--parallel fsdp2", World(size=4), (1000, 1000, 1000)),
        ("--parallel hsdp", World(size=4), (2000, 2000, 2000)),
        ("--parallel zero1", World(size=4), (4000, 4000, 1000)),
        ("--optimizer adamw --dtype bfloat16", World(), (2000, 2000, 4000)),
        ("--dtype bfloat16 --momentum-dtype int8 --step-in-backward", World(), (2000, 0, 1000)),
        ("--momentum 0", World(), (4000, 4000, 0)),
        ("--parallel fsdp1", World(size=4), (4000,)),  # whole while it is wrapped
    ],
)
def test_memory_is_asked_for_before_anything_is_built(arguments: str, world: World, expected: tuple[int, ...]) -> None:
    options = parse(arguments.split())
    assert tuple(capacity.least_bytes(options, settings(options), world, 1000).values()) == expected
    needed = world.local_size * sum(expected)
    with patch.object(capacity, "available", lambda device: needed):
        capacity.check(options, settings(options), world, torch.device("cpu"), 1000)
    with (
        patch.object(capacity, "available", lambda device: needed - 1),
        pytest.raises(UserError, match="--model small needs at least"),
    ):
        capacity.check(options, settings(options), world, torch.device("cpu"), 1000)


@pytest.mark.parametrize(
    ("size", "arguments", "message"),
    [
        (2, "--parallel none", "--parallel none is for one process, and there are 2"),
        (3, "--parallel hsdp --batch-size 6", "3 is not a multiple of 2"),
        (3, "--parallel tp", "2 heads .--model tiny. cannot be split evenly over --tp-size 3"),
        (3, "--parallel ddp", "--batch-size 8 cannot be shared evenly by 3 data-parallel ranks"),
        (2, "--optimizer adafactor", "cannot update sharded tensors"),
        (2, "--optimizer adamw --parallel zero1", "zero1 is for --optimizer sm3; adamw holds the state of every"),
    ],
)
def test_layouts_that_do_not_fit_are_refused_on_every_rank(
    workers: Pool, text: Path, size: int, arguments: str, message: str
) -> None:
    workers(size).run_raises(UserError, figures, f"{FAST} {arguments}", text, match=message)


def corpus_by_rank(text: Path, other: str) -> None:
    """Every rank but the last reads ``text``."""
    world = World.current()
    last = world.rank == world.size - 1
    figures(FAST, text / other if last else text)


def test_a_mistake_on_one_rank_is_raised_on_all(workers: Pool, text: Path) -> None:
    workers(3).run_raises(UserError, corpus_by_rank, text, "lost", match="rank 2: --data .*lost: no such file")


def test_ranks_that_read_different_texts_are_told(workers: Pool, text: Path) -> None:
    workers(3).run_raises(UserError, corpus_by_rank, text, "1.txt", match="the corpus differs .* rank 2 has")


def claim(text: Path, out: Path) -> None:
    figures(f"{FAST} --out {out}", text)


def test_a_taken_folder_stops_every_rank_and_stays_as_it_is(workers: Pool, text: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("precious")
    workers(2).run_raises(UserError, claim, text, tmp_path, match="already holds a run .metrics.jsonl.")
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"


def test_a_mistake_elsewhere_leaves_an_old_run_alone(text: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("precious")
    arguments = [*FAST.split(), "--out", str(tmp_path), "--overwrite"]
    assert main([*arguments, "--data", str(text), "--seq-len", "5000"]) == 2
    assert main([*arguments, "--data", str(text / "lost")]) == 2
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"


def test_no_cuda_device_is_an_error_where_one_is_asked_for() -> None:
    found = torch.cuda.device_count()
    with pytest.raises(UserError, match=f"{found + 1} processes on this machine .* torch finds {found}"):
        World(size=found + 1, local_size=found + 1).device("cuda")
    assert World().device("cpu") == torch.device("cpu")


def test_options_become_json() -> None:
    options = parse(["--data", "some/text", "--beta", "0"])
    assert Options(**{**json.loads(json.dumps(options.as_json())), "data": Path("some/text")}) == options


@pytest.mark.parametrize("module", [info.name for info in pkgutil.walk_packages(launch.__path__, "launch.")])
def test_examples_in_the_documentation_of(module: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(module))
    assert failed == 0


# ------------------------------------------------------------------------------------------------ the recipes


def test_recipes_differ_and_are_for_sm3_alone() -> None:
    like, paper = (chosen(parse(["--recipe", name])) for name in ("adamw-like", "paper"))
    assert chosen(parse([])) == like != paper
    with pytest.raises(UserError, match="--recipe paper is a way to use SM3"):
        chosen(parse(["--recipe", "paper", "--optimizer", "adamw"]))


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("adamw-8bit", "torchao"),
        ("adafactor-transformers", "transformers"),
        ("came", "came_pytorch"),
        ("lion", "lion_pytorch"),
        ("muon", "torch"),
        ("nadamw", "torch"),
    ],
)
def test_peers_take_steps(name: str, package: str) -> None:
    pytest.importorskip(package, reason="pip install 'sm3_dist[compare]'")
    options = parse(["--optimizer", name, "--model", "tiny"])
    model = GPT(PRESETS["tiny"], 16)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build(model, settings(options), options)
    scheduler = schedule(optimizer, options)
    for _ in range(2):
        model(torch.zeros(2, 16, dtype=torch.long)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True) if p.dim() == 2)
    assert state_bytes(optimizer) > 0
    if name == "adamw-8bit":  # tensors of fewer than 4096 elements have float32
        assert state_bytes(optimizer) < 0.9 * adamw_bytes(optimizer)
    assert scheduler.get_last_lr()[0] != settings(options).lr  # the schedule reaches it
