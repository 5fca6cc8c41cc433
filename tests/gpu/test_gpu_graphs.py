"""Steps in CUDA graphs and under torch.compile: the bits of steps that are taken one by one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sm3_dist import SM3

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")

SHAPES = [(512, 384), (384,), (16, 8, 3, 3)]
NARROW = {"momentum_dtype": torch.int8, "stochastic_rounding": True}
KINDS: dict[str, tuple[Any, torch.dtype, dict[str, Any]]] = {
    "paper": (SM3, torch.float32, {"momentum": 0.9}),
    "recipe": (SM3.adamw_like, torch.float32, {"weight_decay": 0.1}),
    "narrow": (SM3.adamw_like, torch.bfloat16, NARROW),
}
WARM = 3


class Side:
    """Parameters that are trained, with data that lies where it is."""

    def __init__(self, kind: str) -> None:
        make, dtype, options = KINDS[kind]
        generator = torch.Generator("cuda").manual_seed(0)
        randn = lambda shape: torch.randn(shape, device="cuda", generator=generator).to(dtype)  # noqa: E731
        self.params = [nn.Parameter(randn(shape)) for shape in SHAPES]
        self.data = [randn(shape) for shape in SHAPES]
        self.rate = torch.tensor(1e-2, device="cuda")
        self.optimizer = make(self.params, lr=self.rate, **options)

    def next(self, number: int) -> None:
        """New data and a new learning rate, in place."""
        generator = torch.Generator("cuda").manual_seed(number)
        for data in self.data:
            data.copy_(torch.randn(data.shape, device="cuda", generator=generator))
        self.rate.fill_(1e-2 / (1 + number))

    def backward(self) -> None:
        """Gradients without sums, whose order a graph might change."""
        terms: Sequence[Tensor] = [(p * d).square().sum() for p, d in zip(self.params, self.data, strict=True)]
        torch.stack(list(terms)).sum().backward()

    def iterate(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()

    def warm_up(self) -> None:
        """As the page of torch.cuda.graph has it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for number in range(WARM):
                self.next(number)
                self.iterate()
        torch.cuda.current_stream().wait_stream(stream)


def compare(expected: Side, actual: Side) -> None:
    for p, q in zip(expected.params, actual.params, strict=True):
        assert torch.equal(q, p)
        for key, value in expected.optimizer.state[p].items():
            assert torch.equal(actual.optimizer.state[q][key], value), key


@pytest.mark.parametrize("kind", KINDS)
def test_forward_backward_and_step_in_one_graph(kind: str) -> None:
    expected, actual = Side(kind), Side(kind)
    for number in range(WARM):
        expected.next(number)
        expected.iterate()
    actual.warm_up()
    graph = torch.cuda.CUDAGraph()
    actual.optimizer.zero_grad()
    with torch.cuda.graph(graph):
        actual.backward()
        actual.optimizer.step()
    for number in range(WARM, WARM + 5):
        for side in (expected, actual):
            side.next(number)
        expected.iterate()
        graph.replay()
    compare(expected, actual)
    actual.next(99)  # and a step outside of it, whose gradients lie elsewhere, and one more within
    expected.next(99)
    kept = [param.grad for param in actual.params]
    actual.iterate()
    expected.iterate()
    for param, grad in zip(actual.params, kept, strict=True):
        param.grad = grad
    graph.replay()
    expected.iterate()
    compare(expected, actual)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_alone_in_a_graph(kind: str) -> None:
    expected, actual = Side(kind), Side(kind)
    for side in (expected, actual):
        for number in range(WARM):
            side.next(number)
            side.iterate()
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph in graphs:  # two without a step in between
        with torch.cuda.graph(graph):
            actual.optimizer.step()
    torch.cuda.empty_cache()
    for number in range(WARM, WARM + 6):
        for side in (expected, actual):
            side.next(number)
            side.optimizer.zero_grad(set_to_none=False)
            side.backward()
        expected.optimizer.step()
        graphs[number % 2].replay()
        if number == WARM + 2:  # another plan: the tables of the graphs stay
            for side in (expected, actual):
                side.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5, device="cuda"))]})
                side.optimizer._current_plan()
            torch.cuda.empty_cache()
    compare(expected, actual)


def test_without_a_step_before_it_a_capture_is_refused() -> None:
    side = Side("recipe")
    side.backward()
    stream = torch.cuda.Stream()
    with (
        pytest.raises(RuntimeError, match="must first write down where its tensors lie"),
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream),
    ):
        side.optimizer.step()
    torch.cuda.synchronize()


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_says_nothing(kind: str) -> None:
    expected, actual = Side(kind), Side(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")  # what it imports for itself
        step = torch.compile(lambda: actual.optimizer.step())
        for number in range(3):
            for side in (expected, actual):
                side.next(number)
                side.optimizer.zero_grad()
                side.backward()
            expected.optimizer.step()
            step()
    compare(expected, actual)
