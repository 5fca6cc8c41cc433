"""Fixtures of all tests."""

from collections.abc import Iterator

import pytest
from harness import Pool

collect_ignore = ["data"]  # scripts that made recorded values, and need more than the tests do


@pytest.fixture(scope="session")
def workers() -> Iterator[Pool]:
    """Run functions on several ranks: ``workers(world_size).run(function, *args)``; see harness.py."""
    with Pool() as pool:
        yield pool
