"""What README and pages show is run: every Python block, with the imports that it has, and README's whole program.

A block may use, without defining them, the names that :func:`given` makes: what a reader has already. On one gloo rank,
where "cuda" reads "cpu".
"""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import os
import re
import socket
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from torch import nn

ROOT = Path(__file__).parents[1]
# Pages whose blocks need packages that the tests do not, and have tests of their own beside the examples.
ELSEWHERE = ROOT / "docs" / "frameworks"


def blocks() -> list[tuple[str, str]]:
    """Every Python block: where it stands, and its text."""
    found = []
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))):
        if ELSEWHERE in file.parents:
            continue
        text = file.read_text()
        for match in re.finditer(r"^( *)```python\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            found.append((f"{file.relative_to(ROOT)}:{line}", textwrap.dedent(match[2])))
    return found


BLOCKS = blocks()
PROGRAM = next(text for place, text in BLOCKS if place.startswith("README") and "init_process_group" in text)


class Model(nn.Module):
    """What stands for the reader's model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


def given() -> dict[str, Any]:
    """What a reader has: a model, an optimizer with state, a scheduler, and numbers."""
    from sm3_dist import SM3

    model = Model()
    optimizer = SM3.adamw_like(model.named_parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    the_rest = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    given = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "policy": None, "plan": {}}
    given |= {"matrices": matrices, "inner": matrices, "the_rest": the_rest}
    return given | dict.fromkeys(("replicas", "shards", "dp", "tp", "machines"), 1)


def torch_sm3(model: nn.Module) -> dict[str, Any]:
    """What the package torch-SM3 saves of an optimizer of this model."""
    from SM3 import SM3

    old = SM3(model.parameters(), lr=0.0)
    old.step()
    return old.state_dict()


def run(text: str, place: str, directory: Path) -> None:
    from fairscale.nn import data_parallel
    from torch.distributed.fsdp import FullyShardedDataParallel

    from launch.job import fairscale_cpu

    os.chdir(directory)
    fairscale_cpu.install()
    namespace = given()
    torch.save(torch_sm3(namespace["model"]), "old.pt")
    if "state" in text and "TrainState(" not in text:
        from sm3_dist.checkpoint import TrainState

        namespace["state"] = TrainState(namespace["model"], namespace["optimizer"], namespace["scheduler"])
    if ">>>" in text:
        result = doctest.DocTestRunner().run(doctest.DocTestParser().get_doctest(text, {}, place, place, 0))
        assert not result.failed
        return
    source = text.replace('"cuda", (machines, 8)', '"cpu", (machines, 1)').replace('"cuda"', '"cpu"')
    on_cpu = {FullyShardedDataParallel: {"device_id": torch.device("cpu")}}
    on_cpu[data_parallel.FullyShardedDataParallel] = {} if "fairscale_cpu" in text else fairscale_cpu.ARGUMENTS
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        for wrapper, arguments in on_cpu.items():
            patch.setattr(wrapper, "__init__", with_defaults(wrapper.__init__, arguments))
        exec(compile(source, place, "exec"), namespace)


def with_defaults(init: Any, arguments: dict[str, Any]) -> Any:
    return lambda self, *args, **kwargs: init(self, *args, **(arguments | kwargs))


@pytest.mark.parametrize(
    ("place", "text"), [pytest.param(*block, id=block[0]) for block in BLOCKS if block[1] != PROGRAM]
)
def test_every_block_runs_with_the_imports_that_it_has(workers: Pool, tmp_path: Path, place: str, text: str) -> None:
    if "from transformers" in text:
        pytest.importorskip("transformers", reason="pip install transformers")
    workers(1).run(run, text, place, tmp_path)


def train(port: int) -> str:
    """Run README's program as torchrun does, in this process; what it prints."""
    rank, size, said = dist.get_rank(), dist.get_world_size(), io.StringIO()
    dist.destroy_process_group()  # the program makes its own
    of_torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    of_torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        for name, value in of_torchrun.items():
            patch.setenv(name, str(value))
        exec(compile(PROGRAM, "train.py", "exec"), {"__name__": "__main__"})
    return said.getvalue()


def test_the_program_of_the_readme_trains(workers: Pool) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said, silent = workers(2).run(train, port)
    assert silent == ""
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", said)]
    assert losses[0] > 5
    assert losses[-1] < 1


def headings(file: Path) -> set[str]:
    """What links within a page may end with, as GitHub and the site make it of its headings."""
    text = re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL)
    found = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {heading.replace(" ", "-") for heading in found}


def test_every_link_leads_to_a_file_and_to_a_heading() -> None:
    seen = 0
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")):
        for path, heading in re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", file.read_text()):
            target, link = file.parent / path if path else file, f"{file.relative_to(ROOT)} links to {path}#{heading}"
            assert target.exists(), link
            assert not heading or heading in headings(target), link
            seen += bool(heading)
    assert seen > 20


def test_the_pictures_can_be_drawn() -> None:
    pytest.importorskip("matplotlib", reason="pip install 'sm3_dist[compare]'")
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "images" / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    for each in (draw.draw_bytes, draw.draw_curves, draw.draw_state, draw.draw_memory):
        _, axes = draw.pyplot.subplots()
        each(axes)
        assert axes.has_data()
    draw.pyplot.close("all")
