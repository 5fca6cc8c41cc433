"""The launcher of Triton's kernels: the code that the first launch found is launched again, with new arguments."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'sm3_dist[triton]'")

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
