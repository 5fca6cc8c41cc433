"""A stand-in for CUDA graphs where there is no GPU: what is launched while one is captured, and launched again.

As in a graph, only work of the device is launched again, on the memory that it was captured with: operations on tensors
and Triton kernels. What the host does, numbers that it computes or writes into pinned memory, is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sm3_dist.kernels.triton import ends, matrix, tables, tiles
from sm3_dist.step import capture, plan

READ_BY_THE_HOST = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
SENT = ("aten.where.Scalar", "aten.scalar_tensor", "aten.lift_fresh", "aten._local_scalar_dense")
"""Operations that make a tensor on the device of a number on the host, or the other way round."""
KERNELS = ((ends, "begin_step"), (ends, "end_step"), (matrix, "step_strip"), (tiles, "step_tiles"))


class Graph(TorchDispatchMode):
    """What :func:`captured` records. Memory that was used while it was captured stays as long as this does."""

    def __init__(self) -> None:
        super().__init__()
        self._work: list[Callable[[], None]] = []
        self._paused = False
        self.sent: list[Tensor] = []
        """What was copied to the device from memory of the host."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert self._paused or not str(function).startswith(SENT), f"{function} sends a number of the host's"
        result = function(*args, **kwargs)
        if not self._paused:
            self._work.append(lambda: self._again(function, args, kwargs, result))
            if function is torch.ops.aten.copy_.default and len(args) > 2 and args[2]:  # non_blocking
                self.sent.append(args[1])
        return result

    @staticmethod
    def _again(function: Any, args: Any, kwargs: Any, result: Any) -> None:
        for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
            if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)

    def launch(self, kernel: Any, grid: Any, args: Any, kwargs: Any) -> None:
        with self.paused():
            kernel[grid](*args, **kwargs)
        self._work.append(lambda: kernel[grid](*args, **kwargs))

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._paused = True
        yield
        self._paused = False

    @torch.no_grad()
    def replay(self) -> None:
        for work in self._work:
            work()


class _Launched:
    """A kernel whose launches are recorded."""

    def __init__(self, graph: Graph, kernel: Any) -> None:
        self._graph, self._kernel = graph, kernel
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self._graph.launch(self._kernel, grid, args, kwargs)


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("the host waits for the device while a graph is captured")


@contextmanager
def captured(work_list: Any) -> Iterator[Graph]:
    """Record what the Triton backend, in the interpreter, launches meanwhile.

    Args:
        work_list: of the kernel, whose launches name theirs; ``None``: there is none yet.
    """
    graph, filled = Graph(), tables._filled
    with ExitStack() as stack:
        for name in READ_BY_THE_HOST:
            original = getattr(Tensor, name)
            allowed = lambda *a, original=original, **k: (original if graph._paused else refuse)(*a, **k)  # noqa: E731
            stack.enter_context(patch.object(Tensor, name, allowed))
        for where in (capture, plan):
            stack.enter_context(patch.object(where, "capturing", lambda device: True))

        def fill(*arguments: Any) -> Tensor:  # by the host
            with graph.paused():
                return filled(*arguments)

        stack.enter_context(patch.object(tables, "_filled", fill))
        stack.enter_context(patch.object(tables.Table, "_staged", refuse))
        for module, name in KERNELS:
            stack.enter_context(patch.object(module, name, _Launched(graph, getattr(module, name))))
        for launch in () if work_list is None else work_list.launches:
            stack.enter_context(patch.dict(launch.__dict__, kernel=_Launched(graph, launch.kernel)))
        with graph:
            yield graph
