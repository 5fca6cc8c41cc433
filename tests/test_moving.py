"""Checkpoints move: every layout to every other, at every world size, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import Pool
from moving import LAYOUTS, PLACES, WORLDS, load_all, save_all, with_recipe, written_once

KINDS = ("recipe", "paper")
MOVES = list(itertools.product(PLACES, PLACES, KINDS))


class Saved(NamedTuple):
    """A checkpoint of the same training from every layout and world size."""

    folder: Path
    recipe: bool

    def run(self, workers: Pool, world: int, what: Callable[..., list[str]], *arguments: Any) -> list[list[str]]:
        """Call a function on every rank, with the settings that were saved."""
        with_settings = (with_recipe,) if self.recipe else ()
        return workers(world, timeout=120).run(*with_settings, what, self.folder, world, *arguments)


@pytest.fixture(scope="module")
def moves(sampled: Callable[[Any], list[Any]]) -> list[Any]:
    return sampled(MOVES)


@pytest.fixture(scope="module")
def saved(workers: Pool, moves: list[Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    saved = {kind: Saved(tmp_path_factory.mktemp(kind), kind == "recipe") for kind in KINDS}
    for kind, world in itertools.product(KINDS, WORLDS):
        names = {name: None for (name, size), _, of in moves if (size, of) == (world, kind)}
        if names:
            assert saved[kind].run(workers, world, save_all, list(names)) == [[]] * world
    return saved


@pytest.mark.parametrize(("name", "world"), PLACES)
def test_loads_what_every_layout_saved(
    workers: Pool, saved: dict[str, Saved], moves: list[Any], name: str, world: int
) -> None:
    here = [(kind, f"{source}-{size}") for (source, size), to, kind in moves if to == (name, world)]
    assert here
    for kind in {kind for kind, _ in here}:
        sources = [source for of, source in here if of == kind]
        assert saved[kind].run(workers, world, load_all, name, sources) == [[]] * world


def test_every_element_is_written_once(saved: dict[str, Saved]) -> None:
    places = [place for each in saved.values() for place in each.folder.iterdir()]
    assert {place.name for place in places} == {f"{name}-{world}" for name, world in PLACES}
    assert [what for place in places for what in written_once(place)] == []


def test_the_table_is_complete() -> None:
    assert len(PLACES) == 1 + len(LAYOUTS) * len(WORLDS)
