"""The samples of long tables: which rows are taken, and by what."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from sampling import sample

pytest_plugins = ["pytester"]
TABLE = [("a", 1), ("a", 2), ("b", 1), ("c", 3), ("c", 3)]

TESTS = """
import pytest
from hypothesis import given, settings, strategies as st

ROWS = [(source, target) for source in "abcd" for target in (1, 2, 3)]

@pytest.mark.sampled("source, target", ROWS)
def test_of_a_table(source, target): ...

def test_that_goes_over_a_table(sampled):
    print(f"went over {len(sampled(ROWS))} rows")

examples = []

@given(st.integers())
def test_of_examples(number):
    examples.append(number)

@pytest.mark.exhaustive(in_sample=True)
def test_count(): print(f"saw {len(examples)} examples")

@pytest.mark.exhaustive
def test_too_long(): ...

def test_always(): ...
"""


@pytest.mark.parametrize("seed", range(5))
def test_a_sample_has_every_value_of_every_column(seed: int) -> None:
    table = [(a, b, {"c": c}) for a, b, c in itertools.product(range(7), "xyz", [None, True]) if (a, b) != (3, "x")]
    taken = [table[number] for number in sample(table, seed)]
    for column in range(3):
        assert {repr(row[column]) for row in taken} == {repr(row[column]) for row in table}
    assert len(taken) == 7


def test_a_sample_depends_on_the_seed_alone() -> None:
    table = list(itertools.product(range(20), range(20)))
    assert sample(table, 1) == sample(table, 1) != sample(table, 2)
    assert sample([], 0) == []


@pytest.fixture
def session(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeini(f"[pytest]\naddopts = --strict-markers\npythonpath = {Path(__file__).parent}")
    pytester.makeconftest("pytest_plugins = ['sampling']")
    pytester.makepyfile(test_tables=TESTS)
    return pytester


def names(result: pytest.RunResult) -> list[str]:
    return [line.split("::")[1].split(" ")[0] for line in result.outlines if "::" in line]


def test_a_run_takes_a_sample(session: pytest.Pytester) -> None:
    result = session.runpytest_subprocess("-v", "-s", "-p", "no:xdist")
    result.stdout.fnmatch_lines(["long tables: the sample of seed 0 *", "*went over 4 rows*", "*saw 100 examples*"])
    found = names(result)
    assert sum(name.startswith("test_of_a_table") for name in found) == 4
    assert "test_too_long" not in found
    assert {"test_always", "test_of_examples"} <= set(found)
    result.assert_outcomes(passed=8, deselected=9)


def test_another_seed_takes_other_rows(session: pytest.Pytester) -> None:
    first, second = (names(session.runpytest_subprocess("-v", "--sample-seed", seed)) for seed in "01")
    assert set(first) != set(second)
    assert len(first) == len(second)


def test_an_exhaustive_run_takes_all(session: pytest.Pytester) -> None:
    result = session.runpytest_subprocess("-v", "-s", "-m", "exhaustive")
    result.stdout.fnmatch_lines(["long tables: every row", "*went over 12 rows*", "*saw 1??? examples*"])
    assert "test_too_long" in names(result)
    assert "test_always" not in names(result)
    result.assert_outcomes(passed=12 + 4, deselected=1)
