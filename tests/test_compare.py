"""The comparison of optimizers: which runs it makes, what it keeps, and what it shows."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
from rich.console import Console

from launch.compare import main
from launch.comparison.comparison import (
    FEWER_BYTES,
    RESULTS,
    Comparison,
    Contestant,
    Trial,
    at_rate,
    best_rate,
    wanted,
)
from launch.comparison.standings import BYTES, CURVES, draw, table
from launch.job.command_line import parse
from launch.job.folder import METRICS
from launch.job.recipe import OPTIMIZERS, settings
from launch.job.world import UserError

SM3, ADAMW = Contestant("small", "sm3"), Contestant("small", "adamw")


class Simulated(Comparison):
    """Losses are a parabola over the learning rate, with a bottom for each optimizer and a step for each seed."""

    BOTTOM: ClassVar = {"sm3": 3, "adamw": 0}
    made: list[tuple[Contestant, Trial]]

    def run(self, contestant: Contestant, trial: Trial) -> dict[str, Any]:
        self.__dict__.setdefault("made", []).append((contestant, trial))
        k, seed = trial
        bits = 2 + 0.1 * (k - self.BOTTOM[contestant.name]) ** 2 + 0.01 * seed
        folder = self.folder(contestant, trial)
        folder.mkdir(parents=True, exist_ok=True)
        records = [{"step": step, "train_bits_per_byte": bits + 1 / step} for step in (10, 20)]
        (folder / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
        run = " ".join(self.arguments(contestant, trial))
        return {"run": run, "bits": None if k > 6 else bits, "bytes_per_parameter": 4.0}


def simulate(out: Path, seeds: int = 3) -> Simulated:
    comparison = Simulated(out, [SM3, ADAMW], seeds, ["--steps", "20"])
    comparison.made = []
    comparison.run_all(2, Console(quiet=True))
    return comparison


def test_the_sweep_goes_on_until_the_best_lies_within(tmp_path: Path) -> None:
    comparison = simulate(tmp_path)
    results = comparison.results(SM3)
    assert best_rate(results) == 3
    assert {k for k, seed in results if seed == 0} == {-1, 0, 1, 2, 3, 4}
    assert {trial for trial in results if trial[1] > 0} == {(k, seed) for k in (2, 3, 4) for seed in (1, 2)}
    assert math.isclose(at_rate(results, 3), 2.01)
    assert {k for k, _ in comparison.results(ADAMW)} == {-1, 0, 1}


def test_a_second_call_makes_only_what_is_missing(tmp_path: Path) -> None:
    first = simulate(tmp_path, seeds=1)
    assert first.made
    assert simulate(tmp_path, seeds=1).made == []
    lines = (tmp_path / RESULTS).read_text().splitlines()
    (tmp_path / RESULTS).write_text("\n".join(lines[:-1]) + "\n")
    assert len(simulate(tmp_path, seeds=1).made) == 1
    more = simulate(tmp_path, seeds=2).made
    assert len(more) == 6
    assert {seed for _, (_, seed) in more} == {1}


def test_without_a_sweep_every_seed_runs_at_the_default_rate(tmp_path: Path) -> None:
    comparison = Simulated(tmp_path, [SM3, ADAMW], 3, ["--steps", "20"], sweep=False)
    comparison.run_all(2, Console(quiet=True))
    assert {trial for _, trial in comparison.made} == {(0, 0), (0, 1), (0, 2)}
    assert len(comparison.made) == 6
    assert list(table(comparison).columns[3].cells) == ["2.0100", "2.9100"]


def test_rates_at_which_training_comes_to_nothing_are_not_the_best() -> None:
    results = {(-1, 0): 3.0, (0, 0): 2.0, (1, 0): math.inf}
    assert best_rate(results) == 0
    assert wanted(results, seeds=1) == []


def test_the_sweep_goes_down_where_training_comes_to_nothing() -> None:
    results = {(k, 0): math.inf for k in (-1, 0, 1)}
    while trials := wanted(results, seeds=1):
        results |= dict.fromkeys(trials, math.inf)
    assert {k for k, _ in results} == set(range(-6, 2))
    results[-4, 0] = 3.0
    assert best_rate(results) == -4
    assert wanted(results, seeds=2) == [(-5, 1), (-4, 1), (-3, 1)]


def test_others_are_shown_where_one_comes_to_nothing(tmp_path: Path) -> None:
    comparison = simulate(tmp_path)
    for record in comparison.records.values():
        if "--optimizer adamw" in record["run"]:
            record |= {"bits": None, "bytes_per_parameter": None}
    draw(comparison)
    assert list(table(comparison).columns[3].cells) == ["2.0100", "inf"]


def test_without_a_sweep_the_table_is_of_the_default_rate(tmp_path: Path) -> None:
    simulate(tmp_path)
    comparison = Simulated(tmp_path, [SM3], 1, ["--steps", "20"], sweep=False)
    assert list(table(comparison).columns[2].cells) == [f"{SM3.start:g}"]


def test_runs_of_other_lengths_lie_apart(tmp_path: Path) -> None:
    folders = {Comparison(tmp_path, [SM3], 1, ["--steps", n]).folder(SM3, (0, 0)) for n in ("20", "99")}
    assert len(folders) == 2


def test_it_draws_and_tabulates(tmp_path: Path) -> None:
    comparison = simulate(tmp_path)
    draw(comparison)
    assert (tmp_path / CURVES).stat().st_size > 0
    assert (tmp_path / BYTES).stat().st_size > 0
    shown = table(comparison)
    assert shown.row_count == 2
    assert sorted(shown.columns[1].cells) == ["adamw", "sm3"]
    assert comparison.curve(SM3) == ([10, 20], pytest.approx([2.11, 2.06]))


def test_one_real_run(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 200)
    common = f"--steps 3 --batch-size 2 --seq-len 16 --parallel none --device cpu --data {text}".split()
    contestant = Contestant("tiny", "sm3-16")
    comparison = Comparison(tmp_path / "out", [contestant], 1, common)
    comparison.keep(comparison.run(contestant, (0, 0)))
    again = Comparison(tmp_path / "out", [contestant], 1, common)
    (bits,) = again.results(contestant).values()
    assert 0 < bits < 9
    assert 4 < again.bytes_per_parameter(contestant) < 6  # momentum in float32, and a little
    assert "tiny sm3-16 lr 0.002 seed 0: " in again.line(contestant, (0, 0))


def test_a_run_that_fails_is_an_error(tmp_path: Path) -> None:
    comparison = Comparison(tmp_path, [SM3], 1, ["--steps", "3", "--data", str(tmp_path / "absent")])
    with pytest.raises(UserError, match=r"failed:\n.*no such file"):
        comparison.run(SM3, (0, 0))
    assert comparison.results(SM3) == {}


@pytest.mark.parametrize("further", ["", " --checkpoint-every 1", " --steps 1"])
def test_a_run_that_comes_to_nothing_is_a_result(further: str, tmp_path: Path) -> None:
    """Whether it is the loss that shows it, weights that are not saved, or, after its last step, the judging."""
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 200)
    common = f"--steps 3 --weight-decay 1e30 --batch-size 2 --seq-len 16 --device cpu --data {text}{further}".split()
    contestant = Contestant("tiny", "sm3")
    assert Comparison(tmp_path / "out", [contestant], 1, common).run(contestant, (9, 0))["bits"] is None


class Failing(Simulated):
    """Every run of AdamW fails."""

    def run(self, contestant: Contestant, trial: Trial) -> dict[str, Any]:
        if contestant is ADAMW:
            raise UserError("failed")
        return super().run(contestant, trial)


def test_runs_beside_one_that_fails_are_kept(tmp_path: Path) -> None:
    comparison = Failing(tmp_path, [ADAMW, SM3], 1, ["--steps", "20"], sweep=False)
    with pytest.raises(UserError, match="failed"):
        comparison.run_all(2, Console(quiet=True))
    assert len(Simulated(tmp_path, [SM3], 1, ["--steps", "20"], sweep=False).results(SM3)) == 1


def test_a_line_that_was_cut_off_is_made_anew(tmp_path: Path) -> None:
    simulate(tmp_path, seeds=1)
    lines = (tmp_path / RESULTS).read_text()
    (tmp_path / RESULTS).write_text(lines[:-10])
    assert len(simulate(tmp_path, seeds=1).made) == 1
    assert simulate(tmp_path, seeds=1).made == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--optimizers adamv", "adamv: there is none of that name"),
        ("--optimizers sm3-papers", "sm3-papers: there is none of that name"),
        ("--seeds 0", "must be at least 1"),
        ("--lr 0.1", "--lr is for compare.py to choose"),
        ("--lr=0.1", "--lr is for compare.py to choose"),
        ("--seed 7", "--seed is for compare.py to choose"),
        ("--optimizers sm3-0", "sm3-0: there is none of that name"),
        ("--models huge", "invalid choice: 'huge'"),
    ],
)
def test_mistakes_are_told_before_anything_is_run(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "out"), *arguments.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("package", "wanted"), [("torchao.optim", "torchao"), ("matplotlib", "matplotlib")])
def test_a_missing_package_is_told_before_anything_is_run(
    package: str, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = "--optimizers sm3 adamw-8bit --models tiny --steps 2 --no-sweep --seeds 1 --held-out-bytes 3000".split()
    with patch.dict(sys.modules, {package: None}):
        assert main(["--out", str(tmp_path), *runs]) == 2
    assert f"pip install {wanted}" in capsys.readouterr().err
    assert not (tmp_path / RESULTS).exists()


def test_every_optimizer_of_the_training_job_can_take_part() -> None:
    variants = [*FEWER_BYTES, "paper", "adamw-like", "muon-like-momentum8", "64"]
    for name in ["sm3", *OPTIMIZERS, *(f"sm3-{variant}" for variant in variants)]:
        contestant = Contestant("small", name)
        options = parse(contestant.arguments)
        assert options.model == "small"
        assert contestant.start == settings(options).lr


@pytest.mark.parametrize(
    ("name", "recipe"),
    [(name, "adamw-like") for name in ("sm3", "sm3-64", "sm3-momentum8", "sm3-adamw-like-bf16")]
    + [("sm3-paper", "paper"), ("sm3-muon-like-momentum8", "muon-like"), ("muon", None)],
)
def test_a_name_stands_for_one_recipe_whatever_the_default_is(name: str, recipe: str | None) -> None:
    assert parse(Contestant("small", name).arguments).recipe == recipe
