"""Commands of README and pages: each has the options that its program wants, and none that it does not know."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from launch import bench, compare, memory
from launch.job.command_line import parse

ROOT = Path(__file__).parents[1]
COMMAND = re.compile(r"^(?:    |\$ )?(?:\S+ && |\w+=\S+ )*(?:python|torchrun) .*?launch/(\w+)\.py(.*)$", re.MULTILINE)


def commands() -> list[tuple[str, str]]:
    """Programs of ``launch/`` with their arguments."""
    pages = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    found = [each for page in pages for each in COMMAND.findall(page.read_text().replace("\\\n", " "))]
    return sorted({(program, " ".join(arguments.split())) for program, arguments in found})


def read(program: str, arguments: list[str], patch: pytest.MonkeyPatch) -> None:
    """As far as the program reads them, and no further."""
    if program in ("train", "watch"):
        parse(arguments)
    elif program == "compare":
        parse(compare.parse(arguments)[1])
    elif program == "bench":
        for module in bench.BENCHMARKS.values():
            patch.setattr(module, "run", lambda _: None)
        bench.main(arguments)
    else:
        assert program == "memory"

        class StoppedError(Exception):
            pass

        def stop(*_: object) -> None:
            raise StoppedError

        patch.setattr(memory, "all_gpus", lambda ranks, most: (ranks, most))
        patch.setattr(memory, "Measurements", stop)
        with pytest.raises(StoppedError):
            memory.main(arguments)


def test_there_are_commands() -> None:
    assert {program for program, _ in commands()} == {"train", "watch", "compare", "bench", "memory"}


@pytest.mark.parametrize(("program", "arguments"), [pytest.param(*each, id=" ".join(each)) for each in commands()])
def test_a_command_is_understood(program: str, arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read(program, shlex.split(arguments), monkeypatch)
