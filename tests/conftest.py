"""Fixtures of all tests."""

from collections.abc import Iterator

import pytest
from harness import Pool


@pytest.fixture(scope="session")
def workers() -> Iterator[Pool]:
    """Run functions on several ranks: ``workers(world_size).run(function, *args)``; see harness.py."""
    with Pool() as pool:
        yield pool
