"""The benchmark of a step: its table and figures on a CPU, and of what is for a GPU all but the GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from launch import bench
from launch.benchmarks import clocks
from launch.benchmarks.clocks import GPUClock, HostClock, Times, bandwidth
from launch.benchmarks.contenders import PEERS, contenders, state_bytes
from launch.benchmarks.shapes import MODELS
from launch.benchmarks.step import LIMIT
from sm3_dist import SM3, kernels

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def little_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "COPIED", 1 << 12)


def test_all_contenders_stand_in_the_table_and_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "times.json"
    common = ["step", "--models", "tiny", "--dtypes", "float32", "bfloat16", "--threads", "1", "--rounds", "2"]
    bench.main([*common, "--json", str(file)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    named = {row[0]: row for row in rows if len(row) == 8}
    assert {LIMIT, *contenders("cpu", torch.float32), ""} <= {*named, ":--"}
    header = ["", "step", "fastest", "first step", "x SGD(fused)", "x AdamW(fused)"]
    assert rows.count([*header, "state per parameter", "memory of a step"]) == 2
    assert named["SGD(fused)"][4] == named["AdamW(fused)"][5] == "1.00"
    results = json.loads(file.read_text())
    assert len({(each["name"], each["dtype"]) for each in results}) == len(results) > 20
    assert all(len(each["seconds"]) == 2 and min(each["seconds"]) > 0 for each in results)
    numel = sum(torch.Size(shape).numel() for shape in MODELS["tiny"]())
    adamw = next(each for each in results if each["name"] == "AdamW(fused)" and each["dtype"] == "bfloat16")
    assert adamw["state_bytes"] == 2 * 2 * numel + 4 * 3  # two moments in bfloat16; counts of steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("step --threads 0", "argument --threads: 0 must be at least 1"),
        ("sharded --ranks 0", "argument --ranks: 0 must be at least 1"),
        ("step --json /dev/null/times.json", "error: [Errno 20] Not a directory: '/dev/null/times.json'"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments.split())
    assert message in capsys.readouterr().err


def test_only_some_contenders_are_made() -> None:
    names = list(contenders("cpu", torch.float32, ["recipe, eager"]))
    assert names[:2] == ["SGD(fused)", "AdamW(fused)"]
    assert len(names) == 6
    assert all(name.startswith("recipe, eager") for name in names[2:])


def test_on_a_gpu_the_triton_backend_and_its_peers_contend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda: {"eager": None, "c": None, "triton": None})
    found = contenders("cuda", torch.bfloat16)
    assert "recipe, triton, 8-bit momentum, stochastic rounding" in found
    assert not any("SM3, c" in name for name in found)
    installed = {kind: type(kind, (AdamW,), {}) for _, kind, _ in PEERS.values()}
    module = type("Module", (), installed)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("importlib.import_module", lambda name: type("Module", (module,), {"SM3": SM3}))
    for device in ("cpu", "cuda"):
        theirs = {name for name, (_, _, needed) in PEERS.items() if needed in ("", device)}
        assert theirs == contenders(device, torch.bfloat16).keys() & {*PEERS}
    assert "FlashAdamW" not in contenders("cuda", torch.float32)
    assert "FlashAdamW" not in contenders("cpu", torch.bfloat16)


def test_state_is_counted_once_and_wherever_it_lies() -> None:
    shared = torch.zeros(5)
    packed = type("Packed", (), {})()
    packed.codes, packed.itself = torch.zeros(7, dtype=torch.int8), packed
    optimizer = AdamW([nn.Parameter(torch.zeros(3))])
    optimizer.state = {0: {"a": shared, "b": [packed]}, 1: {"a": shared, "step": 3}}  # type: ignore[assignment]
    assert state_bytes(optimizer) == 4 * 5 + 7


def test_the_clock_of_the_host_sees_what_a_step_takes_for_itself() -> None:
    held: list[Any] = []
    extra = HostClock().extra_bytes(lambda: held.append(torch.ones(1 << 24, dtype=torch.uint8)))
    assert extra is None or 14 << 20 < extra < 24 << 20


class Timeline:
    """Stands for torch.cuda: says in which order things happened, and how much is allocated."""

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.allocated = 100
        self.most = 10_000

    def Event(self, enable_timing: bool) -> Timeline:
        assert enable_timing
        return self

    def record(self) -> None:
        self.happened.append("record")

    def synchronize(self) -> None:
        self.happened.append("synchronize")

    def elapsed_time(self, other: Timeline) -> float:
        return 5.0

    def _sleep(self, cycles: int) -> None:
        assert cycles > 1e6
        self.happened.append("something else")

    def reset_peak_memory_stats(self) -> None:
        self.most = self.allocated

    def memory_allocated(self) -> int:
        return self.allocated

    def max_memory_allocated(self) -> int:
        return self.most

    def step(self) -> None:
        self.happened.append("step")
        self.most = self.allocated + 7


@pytest.fixture
def timeline(monkeypatch: pytest.MonkeyPatch) -> Iterator[Timeline]:
    line = Timeline()
    monkeypatch.setattr(torch, "cuda", line)
    return line


def test_the_clock_of_a_gpu_reads_events_around_a_step(timeline: Timeline) -> None:
    whole, host, device = GPUClock().time(timeline.step)
    between = ["record", "step", "record", "synchronize"]
    assert timeline.happened == ["synchronize", *between, "something else", *between]
    assert whole == device == 0.005
    assert 0 <= host < 0.005
    assert GPUClock().extra_bytes(timeline.step) == 7


def test_the_bandwidth_is_that_of_the_fastest_copy() -> None:
    class Slower(HostClock):
        seconds = iter((4e-6, 2e-6, 3e-6))

        def time(self, step: clocks.Step) -> Times:
            step()
            return Times(next(self.seconds), 0.0, 0.0)

    assert bandwidth(Slower(), "cpu", rounds=2) == 2 * (1 << 12) / 2e-6
