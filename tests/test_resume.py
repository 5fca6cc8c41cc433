"""A training job that is interrupted and goes on: its checkpoints, and what may happen to them."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos import corpus, tensors
from harness import Pool
from jobs import flip_a_bit, job, same

from launch.job.command_line import parse
from launch.job.world import UserError
from launch.train import Run


@pytest.fixture(scope="module")
def calm(workers: Pool, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run that nobody interrupted, on two ranks."""
    out = tmp_path_factory.mktemp("calm")
    workers(2).run(job, "--checkpoint-every 3 --keep 9", text, out)
    return out


@pytest.fixture(scope="module")
def stopped(workers: Pool, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run on two ranks that was stopped after seven steps; to be copied."""
    out = tmp_path_factory.mktemp("stopped")
    workers(2).run(job, "--checkpoint-every 3", text, out, 7)
    return out


def copy(stopped: Path, out: Path) -> None:
    shutil.copytree(stopped, out, dirs_exist_ok=True)


def saved_steps(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_saves_now_and_then_and_at_the_end(calm: Path) -> None:
    assert saved_steps(calm) == ["step-00000003", "step-00000006", "step-00000008"]


@pytest.mark.parametrize("stop", [2, 5, 7])
def test_interrupted_run_ends_where_an_uninterrupted_one_does(
    workers: Pool, text: Path, calm: Path, tmp_path: Path, stop: int
) -> None:
    workers(2).run(job, "--checkpoint-every 3 --resume auto", text, tmp_path, stop)
    said = workers(2).run(job, "--checkpoint-every 3 --resume auto", text, tmp_path)[0]
    assert (f"resumed from {tmp_path / 'checkpoints'}/step-0000000{stop // 3 * 3}" in said) == (stop >= 3)
    assert same(calm, tmp_path)
    assert saved_steps(tmp_path) == ["step-00000006", "step-00000008"], "--keep is 2"
    logged = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged == [8], "every line once"


def test_goes_on_with_other_ranks_and_another_wrapper(workers: Pool, text: Path, tmp_path: Path) -> None:
    """Sums of gradients are rounded differently then, so the end is nearly the same."""
    weights = []
    workers(2).run(job, "--checkpoint-every 3 --batch-size 6 --parallel hsdp", text, tmp_path / "stopped", 4)
    for out, ranks, parallel in (
        (tmp_path / "a", 2, "fsdp2"),
        (tmp_path / "b", 3, "zero1"),
        (tmp_path / "c", 1, "none"),
    ):
        copy(tmp_path / "stopped", out)
        arguments = f"--checkpoint-every 3 --batch-size 6 --resume auto --parallel {parallel}"
        workers(ranks).run(job, arguments, text, out)
        weights.append(tensors(out / "checkpoints" / "step-00000008")["train.model.embedding.weight"])
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(weights[2], weights[0], rtol=1e-3, atol=1e-5)


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "truncated": ("__1_0.distcp", lambda file: file.write_bytes(file.read_bytes()[:-100]), "bytes instead of"),
    "bit-flipped": ("__0_0.distcp", flip_a_bit, "other contents than when it was written"),
    "rank-missing": ("__1_0.distcp", Path.unlink, "__1_0.distcp cannot be read"),
    "metadata-missing": (".metadata", Path.unlink, ".metadata cannot be read"),
    "manifest-cut": (
        "manifest.json",
        lambda file: file.write_text(file.read_text()[:50]),
        "manifest.json cannot be read",
    ),
}


def jobs(arguments: str, text: Path, *outs: Path) -> list[str]:
    """Several runs in one world, which starts as fast as one of them takes its steps."""
    return [job(arguments, text, out) for out in outs]


@pytest.fixture(scope="module")
def mended(
    workers: Pool, text: Path, stopped: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, str]]:
    """By damage the run that went on, and what it said."""
    outs = {damage: tmp_path_factory.mktemp(damage) for damage in DAMAGES}
    for damage, (name, harm, _) in DAMAGES.items():
        copy(stopped, outs[damage])
        harm(outs[damage] / "checkpoints" / "step-00000006" / name)
    said = workers(2).run(jobs, "--checkpoint-every 3 --resume auto", text, *outs.values())[0]
    return dict(zip(outs, zip(outs.values(), said, strict=True), strict=True))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_put_aside_for_the_one_before(
    calm: Path, mended: dict[str, tuple[Path, str]], damage: str
) -> None:
    out, said = mended[damage]
    assert DAMAGES[damage][2] in said
    assert "It is now called step-00000006.damaged" in said
    assert "at step 3" in said
    assert same(calm, out)


def test_unfinished_checkpoint_is_ignored(workers: Pool, text: Path, stopped: Path, tmp_path: Path) -> None:
    copy(stopped, tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000006"
    newest.rename(newest.with_suffix(".partial"))
    assert "at step 3" in workers(2).run(job, "--checkpoint-every 3 --resume auto", text, tmp_path)[0]
    assert saved_steps(tmp_path) == ["step-00000006", "step-00000008"]


def test_nothing_in_order_is_an_error(workers: Pool, text: Path, stopped: Path, tmp_path: Path) -> None:
    copy(stopped, tmp_path)
    for step in (3, 6):
        flip_a_bit(tmp_path / "checkpoints" / f"step-{step:08}" / ".metadata")
    workers(2).run_raises(UserError, job, "--resume auto", text, tmp_path, match="none of the 2 checkpoints")


@pytest.mark.parametrize("option", ["--lr 0.02", "--seed 3", "--model small", "--batch-size 8", "--recipe paper"])
def test_checkpoint_of_another_run_is_an_error(workers: Pool, text: Path, calm: Path, option: str) -> None:
    name = option.split()[0].strip("-").replace("-", "_")
    workers(2).run_raises(
        UserError, job, f"--resume auto {option}", text, calm, match=f"belongs to another run.*{name} was"
    )
    assert len(saved_steps(calm)) == 3


@pytest.mark.parametrize("option", ["--recipe adamw-like", "--parallel fsdp1-flat"])
def test_checkpoint_of_another_recipe_is_an_error_that_names_both(
    workers: Pool, text: Path, calm: Path, option: str
) -> None:
    line = r"\A[^\n]* belongs to another run: recipe was 'muon-like' and is 'adamw-like'; [^\n]*\Z"
    workers(2).run_raises(UserError, job, f"--resume auto {option}", text, calm, match=line)


@pytest.mark.parametrize(
    ("saved", "other", "passed", "left_out"),
    [
        (
            "--lr 0.02 --momentum 0.8",
            "--recipe adamw-like --clip 2 --seed 3 --momentum-dtype bfloat16",
            "--seed 0 --recipe muon-like --lr 0.02 --momentum 0.8 --clip 1.0",
            "--momentum-dtype",
        ),
        ("--optimizer sgd", "", "--optimizer sgd --momentum 0.9", "--recipe, --beta, --cover-block"),
    ],
)
def test_what_an_error_advises_goes_on(
    workers: Pool, text: Path, tmp_path: Path, saved: str, other: str, passed: str, left_out: str
) -> None:
    workers(1).run(job, f"--checkpoint-every 3 {saved}", text, tmp_path, 4)
    advice = rf"To go on with it pass {passed} and leave {left_out} out; to start anew pass another --out\Z"
    workers(1).run_raises(UserError, job, f"--resume auto {other}", text, tmp_path, match=advice)
    assert "at step 3" in workers(1).run(job, f"--resume auto {passed}", text, tmp_path)[0]


def test_checkpoint_of_another_text_is_an_error(workers: Pool, calm: Path, tmp_path: Path) -> None:
    other = corpus(tmp_path / "text")
    (other / "7.txt").unlink()
    match = "corpus was .* To go on with it let --data be the text as it was; to start anew"
    workers(2).run_raises(UserError, job, "--resume auto", other, calm, match=match)


def test_checkpoint_of_a_run_that_cut_off_elements_is_an_error(workers: Pool, text: Path, tmp_path: Path) -> None:
    in_backward = "--step-in-backward --checkpoint-every 3"
    workers(1).run(job, f"{in_backward} --clip-value 0.5", text, tmp_path, 4)
    match = "another run: clip_value was 0.5 and is None. To go on with it pass --clip-value 0.5; to start anew"
    workers(1).run_raises(UserError, job, f"{in_backward} --resume auto", text, tmp_path, match=match)


def as_version_1(out: Path, **written: Any) -> None:
    """Rewrite what the manifest of step 3 says of the run."""
    file = out / "checkpoints" / "step-00000003" / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"format_version": 1, "run": manifest["run"] | written}))


def test_checkpoint_without_a_recipe_is_adamw_like(workers: Pool, text: Path, tmp_path: Path) -> None:
    """As it was written while that was the default."""
    workers(1).run(job, "--checkpoint-every 3 --recipe adamw-like", text, tmp_path, 4)
    as_version_1(tmp_path, recipe=None)
    match = "recipe was 'adamw-like' and is 'muon-like'"
    workers(1).run_raises(UserError, job, "--resume auto", text, tmp_path, match=match)
    assert "at step 3" in workers(1).run(job, "--resume auto --recipe adamw-like", text, tmp_path)[0]


def momenta(arguments: str, text: Path, out: Path) -> list[float]:
    """With which momenta of matrices and of the rest a run begins, or goes on."""
    found: list[float] = []
    job(arguments, text, out, 4, lambda run: found.extend(group["momentum"] for group in run.optimizer.param_groups))
    return found


def test_checkpoint_of_matrices_with_the_momentum_of_the_rest_goes_on(
    workers: Pool, text: Path, tmp_path: Path
) -> None:
    """As it was written while 0.9 stood for none given."""
    workers(1).run(job, "--checkpoint-every 3", text, tmp_path, 4)
    as_version_1(tmp_path, momentum=0.9)
    match = "momentum was 0.95 and is 0.9. To go on with it pass --momentum 0.95; to start anew"
    workers(1).run_raises(UserError, momenta, "--resume auto --momentum 0.9", text, tmp_path, match=match)
    assert workers(1).run(momenta, "--resume auto", text, tmp_path) == [[0.95, 0.9]]


def test_momentum_of_matrices_is_told_from_none_given(workers: Pool, text: Path, tmp_path: Path) -> None:
    workers(1).run(job, "--checkpoint-every 3 --momentum 0.9", text, tmp_path, 4)
    match = "momentum was 0.9 and is 0.95. To go on with it pass --momentum 0.9; to start anew"
    workers(1).run_raises(UserError, momenta, "--resume auto", text, tmp_path, match=match)
    assert workers(1).run(momenta, "--resume auto --momentum 0.9", text, tmp_path) == [[0.9, 0.9]]


def test_checkpoint_of_a_newer_program_is_an_error(workers: Pool, text: Path, stopped: Path, tmp_path: Path) -> None:
    copy(stopped, tmp_path)
    manifest = tmp_path / "checkpoints" / "step-00000006" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 3}))
    workers(2).run_raises(UserError, job, "--resume auto", text, tmp_path, match="version 3 .* knows those up to 2")


def fill_the_disk_after(step: int) -> Callable[[Run], None]:
    """Files of this process may not grow beyond a size that no checkpoint fits into."""

    def watch(run: Run) -> None:
        save = run.checkpoints.save

        def save_on_full_disk() -> None:
            run.checkpoints.finish()
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000 if run.state.step > step else hard, hard))
            save()

        run.checkpoints.save = save_on_full_disk  # type: ignore[method-assign]

    return watch


def on_a_full_disk(text: Path, out: Path) -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        return job("--checkpoint-every 3", text, out, 7, fill_the_disk_after(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_costs_nothing_that_is_saved(workers: Pool, text: Path, calm: Path, tmp_path: Path) -> None:
    said = workers(2).run(on_a_full_disk, text, tmp_path)[0]
    assert "the checkpoint of step 6 could not be written, older ones stay" in said
    assert saved_steps(tmp_path) == ["step-00000003"]
    assert "at step 3" in workers(2).run(job, "--checkpoint-every 3 --resume auto", text, tmp_path)[0]
    assert same(calm, tmp_path)


def conclude_on_a_full_disk(text: Path, out: Path) -> str:
    runs: list[Run] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        job("--checkpoint-every 3", text, out, None, lambda run: (runs.append(run), fill_the_disk_after(6)(run))[1])
        with pytest.raises(UserError, match="the state after step 8 is not saved; free some space and resume"):
            runs[0].conclude(runs[0].judge())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return runs[0].console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_a_run_that_cannot_save_its_end_says_what_came_of_it(workers: Pool, text: Path, tmp_path: Path) -> None:
    said = workers(2).run(conclude_on_a_full_disk, text, tmp_path)[0]
    assert "the checkpoint of step 8 could not be written" in said
    assert "bits per byte" in said
    assert saved_steps(tmp_path) == ["step-00000003", "step-00000006"]


def come_to_nothing(text: Path, out: Path) -> None:
    """The weights are no numbers any more when step 6 is to be saved."""

    def watch(run: Run) -> None:
        save = run.save

        def save_nothing() -> None:
            if run.state.step == 6 and run.world.leads:
                with torch.no_grad():
                    next(run.model.parameters()).to_local()[0, 0] = torch.nan  # type: ignore[operator]
            save()

        run.save = save_nothing  # type: ignore[method-assign]

    job("--checkpoint-every 3 --keep 1", text, out, None, watch)


def test_weights_that_are_no_numbers_do_not_take_the_place_of_good_ones(
    workers: Pool, text: Path, tmp_path: Path
) -> None:
    match = "the weights are not finite after step 6; pass a lower --lr than 0.01"
    workers(2).run_raises(UserError, come_to_nothing, text, tmp_path, match=match)
    assert saved_steps(tmp_path) == ["step-00000003"]


def test_run_that_is_over_takes_no_more_steps(workers: Pool, text: Path, calm: Path) -> None:
    assert "at step 8" in workers(2).run(job, "--resume auto", text, calm)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--checkpoint-every 3", "need --out"),
        ("--resume auto", "need --out"),
        ("--resume auto --overwrite --out x", "pass one"),
        ("--checkpoint-every 0 --out x", "--checkpoint-every 0 must be at least 1"),
        ("--start-from x --out ./x", "--start-from x is --out: name another directory"),
    ],
)
def test_options_that_make_no_sense(arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(arguments.split())
