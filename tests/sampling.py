"""Tables too long for every run: pytest takes a sample of their rows, and ``pytest -m exhaustive`` takes all.

A sample holds every value of every column of the table at least once: of all moves between 37 places, say, one from
each and one to each. Three ways to have one, and a fourth where there is nothing to take a sample of::

    @pytest.mark.sampled("name, world_size", [("fsdp2", 2), ("fsdp2", 3), ...])  # in the place of parametrize
    def test_a(name, world_size): ...


    def test_b(sampled):  # where one test goes over many rows, in one world say
        for source, target in sampled(MOVES): ...


    @given(st.integers())  # the same 100 examples in each run; with -m exhaustive 1,000 new ones
    def test_c(number): ...


    @pytest.mark.exhaustive  # not taken otherwise
    def test_d(): ...

Which rows are taken depends on nothing but the table and the seed, which is printed in the header; ``--sample-seed N``
takes others. A run with ``-m exhaustive`` takes the tests of these four kinds and no others.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import hypothesis
import pytest

SEED = 0
MARKS = (
    "exhaustive(in_sample=False): taken with -m exhaustive alone, or else as part of a sample",
    "sampled(argnames, rows, **options): parametrize, with a sample of the rows unless -m exhaustive asks for all",
)


def sample(rows: Iterable[Sequence[Any]], seed: int) -> list[int]:
    """Numbers of some rows, in order, that together have every value of every column.

    Which is greedy: of the rows in an order drawn by the seed, always the first that adds the most, and of these one
    whose values were taken least so far.
    """
    cells = [{(column, repr(value)) for column, value in enumerate(row)} for row in rows]
    missing = set().union(*cells)
    left = list(range(len(cells)))
    random.Random(seed).shuffle(left)
    times: Counter[tuple[int, str]] = Counter()
    taken = []
    while missing:
        best = max(left, key=lambda number: (len(cells[number] & missing), -sum(times[cell] for cell in cells[number])))
        taken.append(best)
        left.remove(best)
        missing -= cells[best]
        times.update(cells[best])
    return sorted(taken)


def crossed(*columns: Iterable[Any]) -> list[tuple[Any, ...]]:
    """The rows of a table: everything with everything. What is a tuple fills several columns."""
    cells = ([cell if isinstance(cell, tuple) else (cell,) for cell in column] for column in columns)
    return [sum(row, ()) for row in itertools.product(*cells)]


def takes_all(config: pytest.Config) -> bool:
    return "exhaustive" in config.getoption("markexpr", "")


@pytest.fixture(scope="session")
def sampled(request: pytest.FixtureRequest) -> Callable[[Collection[Sequence[Any]]], list[Any]]:
    """Of the rows of a table those that this run takes."""

    def take(rows: Collection[Sequence[Any]]) -> list[Any]:
        rows = list(rows)
        return rows if takes_all(request.config) else [rows[k] for k in sample(rows, seed_of(request.config))]

    return take


def seed_of(config: pytest.Config) -> int:
    seed: int = config.getoption("sample_seed")
    return seed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample-seed", type=int, default=SEED, help="take another sample of the long tables")


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", mark)
    all_rows = takes_all(config)
    hypothesis.settings.register_profile(
        "sm3_dist", deadline=None, max_examples=1000 if all_rows else 100, derandomize=not all_rows
    )
    hypothesis.settings.load_profile("sm3_dist")


def pytest_report_header(config: pytest.Config) -> str:
    if takes_all(config):
        return "long tables: every row"
    return f"long tables: the sample of seed {seed_of(config)} (another: --sample-seed N; every row: -m exhaustive)"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for mark in metafunc.definition.iter_markers("sampled"):
        names, rows, options = *mark.args, mark.kwargs
        params = [row if hasattr(row, "marks") else pytest.param(*row) for row in rows]
        if not params:
            raise pytest.UsageError(
                f"{metafunc.definition.nodeid}: no rows (of an iterator only the first reader has any)"
            )
        taken = set(sample([param.values for param in params], seed_of(metafunc.config)))
        marks = [pytest.mark.exhaustive(in_sample=number in taken) for number in range(len(params))]
        rows = [pytest.param(*p.values, marks=[*p.marks, mark], id=p.id) for p, mark in zip(params, marks, strict=True)]
        metafunc.parametrize(names, rows, **options)


def pytest_itemcollected(item: pytest.Item) -> None:
    if "sampled" in getattr(item, "fixturenames", ()) or hypothesis.is_hypothesis_test(getattr(item, "obj", None)):
        item.add_marker(pytest.mark.exhaustive(in_sample=True))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if takes_all(config):
        return
    marks = [item.get_closest_marker("exhaustive") for item in items]
    left_out = [mark is not None and not mark.kwargs.get("in_sample") for mark in marks]
    config.hook.pytest_deselected(items=[item for item, out in zip(items, left_out, strict=True) if out])
    items[:] = [item for item, out in zip(items, left_out, strict=True) if not out]
