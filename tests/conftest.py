"""Fixtures of all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

# Threads of several processes on few cores: they sleep while they wait. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from chaos import corpus
from harness import Pool

pytest.register_assert_rewrite("against_eager", "against_reference", "replicas", "steps")  # they assert for tests

pytest_plugins = ["sampling", "worlds"]
collect_ignore = ["data"]  # scripts that made recorded values, and need more than the tests do


LONG = (
    "test_triton",
    "test_triton_code",
    "test_train",
    "test_train_errors",
    "test_memory",
    "test_documents",
    "test_one_rank",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long alone begins first, so that the session does not end with one process at work."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-rank-seconds", type=float, default=15.0, help="try random faults of one rank for so long")
    parser.addoption("--one-rank-seed", type=int, help="and begin with this case")


@pytest.fixture(scope="session")
def workers() -> Iterator[Pool]:
    """Run functions on several ranks: ``workers(world_size).run(function, *args)``; see harness.py."""
    with Pool() as pool:
        yield pool


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Eager operations of this size gain nothing from threads; the C backend gets them where it is called."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of one process."""
    from moving import STEPS, trained
    from torch.distributed.checkpoint.state_dict_saver import save

    from sm3_dist.checkpoint import TrainState

    save({"train": TrainState(*trained(), step=STEPS)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    return tmp_path / "saved"


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus."""
    return corpus(tmp_path_factory.mktemp("corpus") / "text")
