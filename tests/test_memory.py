"""Measuring resident memory: what is counted, every way to train that is measured, and what comes of it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from harness import Pool

from launch import memory, watch
from launch.footprint.footprint import WAYS, train, ways_on
from launch.footprint.meters import Allocated
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
        if way.needs == "torch":
            train(PRESETS["tiny"], way, World.current(), 2, 8, torch.device("cpu"))


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
        "13b": 12.9e9,
        "20b": 20e9,
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


def test_on_gpus_all_of_them_are_used_as_far_as_their_memory_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, str]] = []

    def measure(self: Measurements, way: str, model: str) -> dict[str, object]:
        assert (self.ranks, self.device) == (2, "cuda")
        asked.append((way, model))
        return {"way": way, "model": model, "device": "cuda", "parameters": 1000, "bytes": [1100, 1200]}

    assert memory.main(["--out", str(tmp_path), "--device", "cuda"]) == 2
    assert "needs a GPU, and torch finds none" in capsys.readouterr().err
    monkeypatch.setattr(Measurements, "measure", measure)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 3 * PRESETS["small"].count(seq_len=1)))
    of_cpu = {"way": "recipe-bf16-momentum8", "model": "small", "parameters": 9, "bytes": [1, 1]}
    (tmp_path / RESULTS).write_text(f"{json.dumps(of_cpu)}\n")
    ways = ["adamw", "recipe-bf16-momentum8", "recipe-bf16-momentum8-backward", "sm3-bf16-momentum8"]
    given = ["--out", str(tmp_path), "--device", "cuda", "--models", "small", "--ways", *ways]
    assert memory.main(given) == 0
    assert asked == [(way, "small") for way in ways[1:]]  # 5.1, 3.1 and 3 bytes per parameter, and not 16
    assert "Peak allocated bytes" in (tmp_path / TABLE).read_text()


def test_each_device_has_its_ways() -> None:
    assert "recipe-bf16-momentum8-backward" in ways_on("cuda")
    assert "adafactor" not in ways_on("cuda")
    assert "recipe-bf16-momentum8-backward" not in ways_on("cpu")
    assert ("flash-adamw" in ways_on("cuda")) == (importlib.util.find_spec("flashoptim") is not None)


def test_what_tensors_have_on_a_gpu_is_counted_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter((1000, 1700))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 400)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: next(peaks))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    meter = Allocated()
    meter.begin()
    assert meter.above() == 1300


def test_on_a_gpu_the_driver_says_what_is_occupied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Training:
        returncode, pid, polls = 0, 1, iter((None, None, 0))

        def poll(self) -> int | None:
            return next(self.polls)

    free = iter((900, 700, 300))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(free), 1000))
    monkeypatch.setattr(watch, "child", lambda *_, **__: nullcontext(Training()))
    drawn: list[object] = []
    monkeypatch.setattr(watch, "draw", lambda *arguments: drawn.append(arguments))
    assert watch.main(["--device", "cuda", "--out", str(tmp_path)]) == 0
    assert "most occupied on the GPU: 600 bytes" in capfd.readouterr().out
    assert drawn[0][2] == "occupied on the GPU"  # type: ignore[index]


def test_its_help_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        watch.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "watch.py" in said
    assert watch.ABOUT in said


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
