"""Checkpoints move: every layout to every other, at every world size, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import Pool
from moving import LAYOUTS, PLACES, WORLDS, load_all, save_all, with_recipe, written_once

MOVES = list(itertools.product(PLACES, PLACES))


class Saved(NamedTuple):
    """A checkpoint of the same training from every layout and world size."""

    folder: Path
    recipe: bool

    def run(self, workers: Pool, world: int, what: Callable[..., list[str]], *arguments: Any) -> list[list[str]]:
        """Call a function on every rank, with the settings that were saved."""
        with_settings = (with_recipe,) if self.recipe else ()
        return workers(world, timeout=120).run(*with_settings, what, self.folder, world, *arguments)


@pytest.fixture(scope="module", params=["recipe", "paper"])
def saved(request: pytest.FixtureRequest, workers: Pool, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    saved = Saved(tmp_path_factory.mktemp("moving"), request.param == "recipe")
    for world in WORLDS:
        assert saved.run(workers, world, save_all) == [[]] * world
    return saved


@pytest.mark.parametrize(("name", "world"), PLACES)
def test_loads_what_every_layout_saved(
    workers: Pool, saved: Saved, name: str, world: int, sampled: Callable[[Any], list[Any]]
) -> None:
    sources = [f"{source}-{size}" for (source, size), to in sampled(MOVES) if to == (name, world)]
    assert sources
    assert saved.run(workers, world, load_all, name, sources) == [[]] * world


def test_every_element_is_written_once(saved: Saved) -> None:
    assert {place.name: written_once(place) for place in saved.folder.iterdir()} == {f"{n}-{w}": [] for n, w in PLACES}


def test_the_table_is_complete() -> None:
    assert len(PLACES) == 1 + len(LAYOUTS) * len(WORLDS)
