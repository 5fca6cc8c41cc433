"""Benchmarks over ranks reach into what they measure, so nothing but a run tells that they still can."""

from __future__ import annotations

import pytest

from launch import bench


def rows(said: str) -> list[list[str]]:
    """The cells of a Markdown table."""
    return [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| ")][1:]


def test_planning_is_measured_and_sends_as_much_on_any_number_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["scale", "--models", "7b", "--ranks", "8", "4096"])
    assert [(ranks, tensors, shared) for _, ranks, tensors, *_, shared in rows(capsys.readouterr().out)] == [
        ("8", "291", "1146884"),
        ("4096", "291", "1146884"),
    ]


def test_steps_of_sharded_models_are_measured(capfd: pytest.CaptureFixture[str]) -> None:
    bench.main(["sharded", "--model", "tiny", "--ranks", "2", "--steps", "1"])
    found = rows(capfd.readouterr().out)
    assert [(wrapper, ranks, collectives) for wrapper, ranks, _, _, collectives, *_ in found] == [
        ("fsdp2", "2", "1"),
        ("fsdp1", "2", "1"),
    ]


def test_orthogonal_steps_are_measured(capfd: pytest.CaptureFixture[str]) -> None:
    bench.main(["orthogonal", "--layers", "1", "--width", "64", "--ranks", "1", "2", "--steps", "1"])
    found = rows(capfd.readouterr().out)
    assert [(ranks, who, sent != "0.00 MB") for ranks, who, *_, sent in found] == [
        ("1", "SM3, orthogonal", False),
        ("1", "torch.optim.Muon", False),
        ("2", "SM3, orthogonal", True),
    ]
