"""Measuring resident memory: what is counted, every way to train that is measured, and what comes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import Pool

from launch import memory, watch
from launch.footprint.footprint import WAYS, train
from launch.footprint.resident import forget_peak, peak, resident
from launch.job.model import PRESETS
from launch.job.world import World
from launch.memory import RESULTS, TABLE, Measurements

MB = 1 << 20
PNG = b"\x89PNG"


def test_the_peak_outlasts_what_was_freed_until_it_is_forgotten() -> None:
    base = resident()
    forget_peak()
    assert abs(peak() - base) < 8 * MB
    held = torch.ones(64 * MB, dtype=torch.uint8)
    assert resident() - base > 56 * MB
    del held
    assert peak() - base > 56 * MB > resident() - base
    forget_peak()
    assert peak() - base < 8 * MB


def test_a_process_that_has_ended_occupies_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    assert resident(process.pid) == 0


def train_in_every_way() -> None:
    for way in WAYS.values():
        train(PRESETS["tiny"], way, World.current(), steps=2, seq_len=8)


def test_every_way_trains_a_sharded_model(workers: Pool) -> None:
    workers(2).run(train_in_every_way)


def test_presets_have_the_size_that_their_names_say() -> None:
    for name, size in {
        "125m": 125e6,
        "350m": 350e6,
        "760m": 760e6,
        "1.3b": 1.3e9,
        "2.7b": 2.7e9,
        "6.7b": 6.7e9,
    }.items():
        assert PRESETS[name].count(seq_len=128) == pytest.approx(size, rel=0.03)


def test_measurements_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is kept, what is too large is left out, and the rest is measured once."""
    asked: list[tuple[str, str]] = []

    def measure(self: Measurements, way: str, model: str) -> dict[str, object]:
        asked.append((way, model))
        return {"way": way, "model": model, "parameters": 1000, "bytes": [1100, 1200]}

    monkeypatch.setattr(Measurements, "measure", measure)
    old = {"way": "sm3-bf16", "model": "tiny", "parameters": 100, "bytes": [130, 120]}
    of_three = old | {"way": "adamw", "bytes": [1, 1, 1]}
    (tmp_path / RESULTS).write_text(f"{json.dumps(old)}\n{json.dumps(of_three)}\n")
    common = ["--out", str(tmp_path), "--ways", "adamw", "sm3-bf16", "--models", "tiny", "small"]
    most = 5 * PRESETS["small"].count(seq_len=1)  # of the larger model two bytes per parameter, but not sixteen
    for _ in range(2):
        assert memory.main([*common, "--most", str(most)]) == 0
    assert asked == [("adamw", "tiny"), ("sm3-bf16", "small")]
    assert " 2.50 " in (tmp_path / TABLE).read_text()
    assert (tmp_path / memory.PICTURE).read_bytes().startswith(PNG)


def test_a_measurement_that_fails_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert memory.main(["--out", str(tmp_path), "--ranks", "0"]) == 2
    assert "--ranks 0 must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / RESULTS).exists()


def test_a_run_is_watched_and_drawn(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("Resident memory is what a process occupies.\n" * 100)
    options = ["--model", "tiny", "--steps", "2", "--log-every", "1", "--seq-len", "16", "--batch-size", "2"]
    assert watch.main([*options, "--out", str(tmp_path / "run"), "--data", str(tmp_path / "text.txt")]) == 0
    samples = [json.loads(line) for line in (tmp_path / "run" / watch.SAMPLES).read_text().splitlines()]
    assert max(size for _, size in samples) > 100 * MB
    assert (tmp_path / "run" / watch.PICTURE).read_bytes().startswith(PNG)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [1, 2, 2]
    assert f"most resident: {max(size for _, size in samples):,} bytes" in capfd.readouterr().out
    assert watch.main(["--model", "tiny"]) == 2
    assert "watching needs --out DIRECTORY" in capfd.readouterr().err
