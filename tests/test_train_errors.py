"""What the training job says of mistakes, on every rank, and how its processes end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from harness import Pool
from training import FAST, TRAIN, figures, torchrun

from launch.job import capacity
from launch.job.alone import alone
from launch.job.command_line import parse
from launch.job.recipe import settings
from launch.job.world import UserError, World
from launch.train import main


def test_a_mistake_is_not_restarted_and_its_line_is_the_last(text: Path) -> None:
    done = torchrun("--data", text, "--lr", "nan", restarts=50)
    line = "error: --lr nan must be at least 0 and less than inf"
    assert done.returncode == 1
    assert done.stderr.count(line) == 2, done.stderr  # when it was found, and at the end
    assert done.stderr.splitlines()[-1] == line
    assert "[rank" not in done.stderr, "ranks leave together, without a traceback"


def test_a_process_leaves_without_finalizing_the_interpreter() -> None:
    script = (
        "import atexit, launch.job.leaving as job; atexit.register(print, 'finalized'); print('said'); job.leave(3)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=TRAIN.parents[1])
    assert (done.returncode, done.stdout) == (3, "said\n")


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
        ("--data /dev/null", "--data /dev/null: is neither a file nor a directory"),
        ("--batch-size 1000000000000", "for what the model says of each next byte, and "),
        ("--seq-len 3000", "--seq-len 3000 needs at least 3001 bytes to hold out, and there are 3000"),
        ("--parallel hsdp --replicas 2", "1 is not a multiple of 2"),
        ("--parallel tp --tp-size 2", "--tp-size 2 does not divide the 1 ranks"),
        ("--out /dev/null/run", "--out /dev/null/run cannot be written to"),
        ("--optimizer sgd --momentum-dtype bfloat16", "--optimizer sgd has no momentum_dtype"),
        ("--optimizer adamw --rounding nearest", "--optimizer adamw has no rounding"),
        ("--step-in-backward", "is used and freed before the next is there. Pass --clip-value"),
        ("--clip-value 1", "is for --step-in-backward"),
        ("--recipe muon-like --parallel fsdp1-flat", "muon-like: blocks.0.attention.query.weight, a matrix, and"),
        ("--recipe muon-like --parallel fairscale", "muon-like: blocks.0.attention.query.weight, a matrix, and"),
        ("--recipe muon-like --step-in-backward --clip inf", "with orthogonalize a step needs the whole update"),
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
    options = parse([*arguments.split(), "--batch-size", "1", "--seq-len", "1"])
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


def test_one_run_at_a_time_writes_to_a_folder(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = [*FAST.split(), "--data", str(text), "--out", str(out)]
    with alone(out):
        for how in ("--overwrite", "--resume=auto"):
            assert main([*arguments, how]) == 2
            assert f"another run is writing to --out {out} at this moment" in capsys.readouterr().err
        assert list(out.iterdir()) == []
    assert not out.exists(), "nothing was put into it"
    out.mkdir()
    with alone(out):
        pass
    assert out.exists(), "it was there before"
    with pytest.raises(UserError, match="cannot be written to: Not a directory"), alone(text / "1.txt" / "run"):
        pass


def test_a_run_does_not_learn_from_what_it_writes(text: Path) -> None:
    with pytest.raises(UserError, match=r"is within --data .* name a directory outside"):
        parse(["--data", str(text), "--out", str(text / "runs" / "one")])
    assert parse(["--data", str(text), "--out", str(text / ".runs" / "one")]).out == text / ".runs" / "one"


def test_no_cuda_device_is_an_error_where_one_is_asked_for() -> None:
    found = torch.cuda.device_count()
    with pytest.raises(UserError, match=f"{found + 1} processes on this machine .* torch finds {found}"):
        World(size=found + 1, local_size=found + 1).device("cuda")
    assert World().device("cpu") == torch.device("cpu")
