"""A training job that starts from the weights of another: fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from chaos import tensors
from harness import Pool
from jobs import flip_a_bit, job, same

from launch.job.world import UserError

MODEL = "train.model."
STANDING_STILL = "--lr 0 --steps 1 --checkpoint-every 1"


@pytest.fixture(scope="module")
def before(workers: Pool, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run whose weights are started from, on two ranks, with another optimizer."""
    out = tmp_path_factory.mktemp("before")
    workers(2).run(job, "--checkpoint-every 4 --optimizer adamw", text, out)
    return out


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    saved = tensors(out / "checkpoints" / f"step-{step:08}")
    return {name: value for name, value in saved.items() if name.startswith(MODEL)}


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (1, "none"),
        (2, "fsdp2"),
        (2, "fsdp1"),
        (2, "fsdp1-flat"),
        (2, "fairscale"),
        (2, "zero1"),
        (2, "oss"),
        (2, "tp"),
        (4, "hsdp"),
    ],
)
def test_starts_from_the_last_weights(
    workers: Pool, text: Path, before: Path, tmp_path: Path, ranks: int, parallel: str
) -> None:
    said = workers(ranks).run(job, f"{STANDING_STILL} --start-from {before} --parallel {parallel}", text, tmp_path)[0]
    assert f"its weights are those of {before / 'checkpoints' / 'step-00000008'}" in said
    wanted, found = weights(before, 8), weights(tmp_path, 1)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_an_interrupted_one_goes_on_from_its_own(workers: Pool, text: Path, before: Path, tmp_path: Path) -> None:
    start = f"--checkpoint-every 3 --start-from {before}"
    workers(2).run(job, start, text, tmp_path / "calm")
    workers(2).run(job, f"{start} --resume auto", text, tmp_path / "stopped", 5)
    assert "at step 3" in workers(2).run(job, f"{start} --resume auto", text, tmp_path / "stopped")[0]
    assert same(tmp_path / "calm", tmp_path / "stopped")
    assert not torch.equal(*(weights(tmp_path / "calm", s)[f"{MODEL}embedding.weight"] for s in (6, 8)))


def test_weights_are_part_of_what_a_run_is(workers: Pool, text: Path, before: Path, tmp_path: Path) -> None:
    fine, plain = tmp_path / "fine", tmp_path / "plain"
    workers(1).run(job, f"--checkpoint-every 3 --start-from {before}", text, fine, 4)
    workers(1).run(job, "--checkpoint-every 3", text, plain, 4)
    for out, passed, advice in (
        (fine, "", "let --start-from be the run as it was"),
        (fine, f"--start-from {plain}", "let --start-from be the run as it was"),
        (plain, f"--start-from {before}", "leave --start-from out"),
    ):
        match = f"start was .* To go on with it {advice}; to start anew pass another --out"
        workers(1).run_raises(UserError, job, f"--resume auto {passed}", text, out, match=match)


def test_nothing_to_start_from(workers: Pool, text: Path, tmp_path: Path) -> None:
    match = f"--start-from {tmp_path}: there is no complete checkpoint in {tmp_path / 'checkpoints'}"
    workers(2).run_raises(UserError, job, f"--start-from {tmp_path}", text, tmp_path / "out", match=match)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "harm", "words"),
    [
        ("__1_0.distcp", flip_a_bit, "is damaged: __1_0.distcp has other contents than when it was written"),
        ("__0_0.distcp", Path.unlink, r"is damaged: __0_0.distcp cannot be read"),
        ("manifest.json", lambda file: file.write_text("{}"), "manifest.json cannot be read"),
    ],
)
def test_damaged_weights_are_refused(
    workers: Pool, text: Path, tmp_path: Path, file: str, harm: Callable[[Path], object], words: str
) -> None:
    workers(2).run(job, "--checkpoint-every 8", text, tmp_path)
    harm(tmp_path / "checkpoints" / "step-00000008" / file)
    match = f"--start-from.*{words}"
    workers(2).run_raises(UserError, job, f"--start-from {tmp_path}", text, tmp_path / "out", match=match)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--seq-len 32", "--model small"])
def test_weights_of_another_model_are_refused(
    workers: Pool, text: Path, before: Path, tmp_path: Path, option: str
) -> None:
    match = "--start-from: cannot load .* --model and --seq-len must be those of that run"
    workers(2).run_raises(UserError, job, f"{option} --start-from {before}", text, tmp_path / "out", match=match)
    assert not (tmp_path / "out").exists()
