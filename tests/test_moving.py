"""Checkpoints move: every layout to every other, at every world size, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Pool
from moving import LAYOUTS, PLACES, WORLDS, load_all, save_all, with_recipe, written_once


@pytest.fixture(scope="module")
def saved(workers: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the same training from every layout and world size."""
    folder = tmp_path_factory.mktemp("moving")
    for world in WORLDS:
        found = workers(world).run(save_all, folder, world)
        assert found == [[]] * world
    return folder


@pytest.mark.parametrize(("name", "world"), PLACES)
def test_loads_what_every_layout_saved(workers: Pool, saved: Path, name: str, world: int) -> None:
    assert len(list(saved.iterdir())) == len(PLACES)
    assert workers(world, timeout=120).run(load_all, saved, world, name) == [[]] * world


def test_the_recipe_moves(workers: Pool, tmp_path: Path) -> None:
    """Block covers and averages of squares too, between wrappers of each kind."""
    places = [("single", 1), ("zero", 3), ("fsdp2", 2), ("fsdp2", 3), ("fsdp1", 2), ("fsdp1_flat", 3), ("tp_fsdp2", 4)]
    for name, world in places:
        found = workers(world).run(with_recipe, save_all, tmp_path, world, [name])
        assert found == [[]] * world
    for name, world in places:
        found = workers(world, timeout=120).run(with_recipe, load_all, tmp_path, world, name)
        assert found == [[]] * world


def test_every_element_is_written_once(saved: Path) -> None:
    assert {place.name: written_once(place) for place in saved.iterdir()} == {f"{n}-{w}": [] for n, w in PLACES}


def test_the_table_is_complete() -> None:
    assert len(PLACES) == 1 + len(LAYOUTS) * len(WORLDS)
