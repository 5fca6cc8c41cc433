"""What a step of the Triton backend does not do anew: it finds no code and writes no list that stood already."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'sm3_dist[triton]'")

from sm3_dist.kernels.triton import backend
from sm3_dist.kernels.triton.launcher import Launcher


class Compiled:
    """Machine code, which writes down how it is launched."""

    def __init__(self) -> None:
        self.launched: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.launched.append((grid, arguments))


class Kernel:
    """A kernel, as Triton launches it, with the code that it finds."""

    def __init__(self, code: Compiled | None) -> None:
        self.code = code
        self.launched: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> Compiled | None:
            self.launched.append((grid, arguments, options))
            return self.code

        return launch


def test_the_code_of_the_first_launch_is_launched_again() -> None:
    code = Compiled()
    kernel, launcher = Kernel(code), Launcher()
    for argument in "abc":
        launcher(kernel, 7, [argument], ["constant"], {"num_warps": 1})
    assert kernel.launched == [((7,), ("a", "constant"), {"num_warps": 1})]
    assert code.launched == [((7, 1, 1), ("b", "constant")), ((7, 1, 1), ("c", "constant"))]


def test_the_interpreter_is_asked_every_time() -> None:
    kernel, launcher = Kernel(None), Launcher()
    for argument in "ab":
        launcher(kernel, 2, [argument])
    assert [arguments for _, arguments, _ in kernel.launched] == [("a",), ("b",)]


def test_a_list_is_written_anew_where_weights_are_aligned_otherwise_and_not_where_they_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Orthogonal updates, which take a weight's place, lie elsewhere in each step."""
    made: list[Any] = []
    monkeypatch.setattr(backend, "WorkList", lambda *arguments: made.append(arguments))
    kernel: Any = object.__new__(backend.TritonKernel)  # which needs a GPU
    vars(kernel).update(entries=[], _groups=[], _released=[], _operands=SimpleNamespace(params=[]))
    vars(kernel).update(_unaligned=frozenset(), _stale=True)
    vars(kernel).update({name: [] for name in ("_flags", "_seen", "_weights", "_offsets", "_where")})
    for weights, lists in [
        ([64, 128], 1),
        ([64, 128], 1),
        ([6400, 12800], 1),  # moved
        ([6400, 12804], 2),
        ([64, 128], 3),
    ]:
        kernel._keep_list(weights, [16, 32], [])
        assert len(made) == lists, weights
