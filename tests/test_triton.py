"""The Triton kernel without a GPU: its results in Triton's interpreter.

Whether Triton interprets is decided when it is imported, so this happens in processes of their own: this file as a
script, with what to do as its arguments.
"""

import sys
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version
from triton_process import run

pytest.importorskip("triton", reason="triton is not installed: pip install 'sm3_dist[triton]'")

CHECKS = (
    "plain that_the_host_reads_nothing touched_state recipe",
    "random single_values averages memory boxes graphs no_elements",
)
"""Those of one process, which takes seconds to import what it needs: as many as a small machine has processors."""


@pytest.mark.skipif(
    Version(version("triton")) < Version("3.7"),
    reason="older interpreters of Triton do not run with NumPy 2.4",
)
@pytest.mark.parametrize("checks", CHECKS)
def test_the_interpreted_kernels_give_the_bits_of_eager(checks: str) -> None:
    assert run(__file__, "1", *checks.split()) == f"checked {checks}\n"


SHAPES = [(), (7,), (2100,), (0,), (33, 17), (3, 150), (1, 30), (30, 1), (0, 5), (2, 3, 5), (6, 4, 3, 3)]
ALIGNED = [(66, 128), (24, 192), (70, 64)]
"""Matrices whose rows are whole vectors in memory."""
LITTLE = [(), (7,), (100,), (5, 16), (2, 3, 5), (2, 2, 2, 3)]
"""For blocks of 3, of which the interpreter takes one at a time."""


def compare_shapes(
    dtype: Any, settings: dict[str, Any], shapes: list[tuple[int, ...]], missing: int, steps: int = 2
) -> None:
    import torch
    from against_eager import compare, gradient

    generator = torch.Generator().manual_seed(missing)
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    grads = [[gradient(s, dtype, generator, special) for s in shapes] for special in (False, True, False)[:steps]]
    grads[-1][missing % len(shapes)] = None
    compare(weights, grads, "triton", **settings)


def check_plain() -> None:
    from against_eager import DTYPES, SETTINGS

    float32, bfloat16, float16 = DTYPES
    cases = [(float32, SETTINGS[1]), (float32, SETTINGS[4]), (float32, {"eps": 0.0}), (bfloat16, SETTINGS[2])]
    for number, (dtype, settings) in enumerate([*cases, (float16, SETTINGS[3]), (float32, SETTINGS[8])]):
        compare_shapes(dtype, settings, [*SHAPES[number % 4 :: 4], ALIGNED[number % 3]], number)


def check_recipe() -> None:
    """Steps after the second have an average of squares to go by."""
    from unittest.mock import patch

    import torch
    from against_eager import DTYPES, LONG_BLOCKS, RECIPE, compare_longest

    from sm3_dist.kernels.triton import work_list

    float32, bfloat16, float16 = DTYPES
    recipe = RECIPE | {"cover_product": True, "nesterov": True, "weight_decay": 0.1, "cover_block": 64}
    narrow = {"momentum_dtype": torch.bfloat16}
    cases = [(float32, recipe), (bfloat16, recipe | narrow)]
    cases += [(float16, recipe | {"cover_block": 32, "cover_product": False}), (float32, recipe | {"cover_block": 200})]
    for number, (dtype, settings) in enumerate(cases):
        shapes = [*SHAPES[number % 4 :: 4], ALIGNED[number % 3], (5, 3, 6)]
        compare_shapes(dtype, settings, shapes, number, steps=3 if number == 0 else 2)
    compare_shapes(float32, recipe | {"cover_block": 3}, LITTLE, 1)
    with patch.object(work_list, "INTERPRETED_TALL", 1):  # as many rows for each sum as on a GPU
        for rows in LONG_BLOCKS:
            compare_longest(rows, recipe, "triton", "cpu")


def check_random() -> None:
    import torch
    from against_eager import DTYPES, RECIPE

    float32, bfloat16, _ = DTYPES
    recipe = RECIPE | {"cover_block": 64, "cover_product": True, "nesterov": True}
    seed = {"stochastic_rounding": True, "rounding_seed": (1 << 63) + 12345}
    cases = [(bfloat16, recipe, torch.int8), (bfloat16, {"momentum": 0.9}, torch.bfloat16)]
    cases += [(float32, recipe, torch.int8), (bfloat16, {"momentum": 0.9}, torch.int8)]
    compare_shapes(float32, recipe | seed | {"cover_block": 3, "momentum_dtype": torch.int8}, LITTLE, 2)
    for number, (dtype, settings, narrow) in enumerate(cases):
        shapes = [*SHAPES[number % 4 :: 4], ALIGNED[number % 3]]
        compare_shapes(dtype, settings | seed | {"momentum_dtype": narrow}, shapes, number)


def check_memory() -> None:
    import torch
    from against_eager import RECIPE, compare_views

    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    weights = [
        randn(101)[1:],
        randn(20 * 33 + 3)[3:].view(20, 33),
        randn(20, 30).t(),
        randn(20, 30)[:, 3:20],
        randn(4, 6, 5, 4).to(memory_format=torch.channels_last),
    ]
    little = [randn(7 * 5 + 3)[3:].view(7, 5), randn(7, 8).t(), randn(4, 20)[:, 3:10]]
    little += [randn(2, 3, 2, 3).to(memory_format=torch.channels_last)]
    product = RECIPE | {"cover_block": 16, "cover_product": True}
    codes = {"momentum_dtype": torch.int8}
    cases = [(weights, {"momentum": 0.9} | codes), (weights, product | codes), (little, {"cover_block": 3})]
    for given, settings in cases:
        grads = [[torch.empty_like(w).copy_(randn(*w.shape)) for w in given], [randn(*w.shape) for w in given]]
        compare_views(given, grads, "triton", **settings)


def check_boxes() -> None:
    import torch
    from against_eager import compare_boxes, compare_shard

    from sm3_dist.kernels.triton.backend import TritonKernel
    from sm3_dist.layout.box import Box
    from sm3_dist.layout.shard import LocalShard

    for number, shape in enumerate([(10, 7), (30, 304), (6, 5, 4), (5, 4, 3, 2)]):
        compare_boxes(shape, number % 2 == 0, TritonKernel, ranges=1 + number % 2)
    for number, (shape, block) in enumerate([((6, 7), 2), ((20, 40), 8), ((7, 10), 3), ((3, 4, 2, 3), 2)]):
        compare_boxes(shape, number % 2 == 1, TritonKernel, 1, block, is_product=block % 2 == 0)
    box = Box((0, 8), (4, 128))  # the first strip begins 8 columns before it, where NaN in a row's entry goes on
    shard = LocalShard((4, 128), (box,), 0, replicated=False, cover_block=64)
    compare_shard(shard, (480,), TritonKernel, torch.Generator().manual_seed(0), is_product=True, is_spoiled=True)


def check_that_the_host_reads_nothing() -> None:
    """In a step like the one before: it waits for no value and sends none, so that a CUDA graph can have it."""
    from contextlib import ExitStack
    from unittest.mock import MagicMock, patch

    import torch
    from against_eager import assert_same

    from sm3_dist.kernels.eager import EagerKernel
    from sm3_dist.kernels.triton import ends
    from sm3_dist.kernels.triton.backend import TritonKernel
    from sm3_dist.layout.box import Box
    from sm3_dist.layout.shard import LocalShard
    from sm3_dist.maths.rms import square_sum
    from sm3_dist.maths.update import Settings
    from sm3_dist.step.entry import HYPERPARAMETERS, Entry

    def refuse(*_, **__):
        raise AssertionError("the host reads a tensor, or makes one of its own numbers")

    options = {"momentum": 0.9, "beta": 0.95, "bias_correction": True, "update_rms": 0.2}
    group = dict.fromkeys(HYPERPARAMETERS) | options
    numbers = {"momentum": 0.9, "eps": 1e-30, "weight_decay": 0.1, "maximize": False, "nesterov": True}
    settings = Settings(torch.tensor(0.3), **numbers, cover_product=True, unscale=torch.tensor(0.5))
    results, works = [], []
    for work in (EagerKernel, TritonKernel):
        entries = []
        for shape in [(7,), (20, 30)]:
            generator = torch.Generator().manual_seed(0)
            param = torch.nn.Parameter(torch.randn(shape, generator=generator))
            param.grad = torch.randn(shape, generator=generator)
            shard = LocalShard(shape, (Box.whole(shape),), cover_block=8)
            accumulators = [torch.zeros(s.shape) for s in shard.stored]
            squares = square_sum(shape, torch.zeros((), dtype=torch.int64))
            moment, step = torch.zeros(shape), torch.zeros(())
            entries.append(Entry(param, group, shard, accumulators, moment, step, squares, "x"))
        works.append(work(entries))
        with torch.no_grad():
            for _ in range(2):
                works[-1].update({id(group): settings})
        results.append([x for e in entries for x in (e.param.detach(), e.momentum_buffer, e.step, *e.accumulators)])
    for expected, actual in zip(*results, strict=True):
        assert_same(actual, expected, "tensor lr")

    launched = MagicMock()  # in the place of the kernels, which the interpreter runs on the host
    with torch.no_grad(), ExitStack() as stack:
        for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            stack.enter_context(patch.object(torch.Tensor, name, refuse))
        for name in ("tensor", "as_tensor", "from_numpy"):
            stack.enter_context(patch.object(torch, name, refuse))
        stack.enter_context(patch.object(ends, "begin_step", launched))
        for launch in works[1]._work.launches:
            stack.enter_context(patch.object(type(launch.kernel), "__getitem__", launched.__getitem__))
        works[1].update({id(group): settings})
    assert launched.__getitem__.call_count == 3  # the beginning, vectors, matrices: nothing goes aside


def check_graphs() -> None:
    """Steps that are captured and replayed, with others in between, beside steps that are not: a stand-in for CUDA's.

    The learning rate and the gradients change where they lie; what a step adds up is there for the next, whoever took
    it; and the tables of a graph stay, though another plan was made since.
    """
    import gc
    import weakref
    from dataclasses import replace
    from unittest.mock import patch

    import pytest
    import torch
    from against_eager import RECIPE, assert_same
    from recorded import captured

    from sm3_dist import SM3, optimizer
    from sm3_dist.step.param_groups import settings_of

    def held(params, owner):
        states = [x for p in params for x in owner._keeper.states[p].values()]
        return [*(p.detach() for p in params), *states, *(b._buffer for b in owner._current_plan().buckets)]

    def on_gpu(group, unscale):  # where the host does not read the learning rate
        return replace(settings_of(group | {"lr": 0.0}, unscale), lr=group["lr"])

    def compare_graph(options) -> None:
        generator = torch.Generator().manual_seed(0)
        randn = lambda: [torch.randn(shape, generator=generator) for shape in [(8, 128), (5,), (3, 4)]]  # noqa: E731
        weights, buffers, rates = randn(), randn(), (torch.tensor(0.3), torch.tensor(0.3))
        sides = [[torch.nn.Parameter(w.clone()) for w in weights] for _ in rates]
        backends = ("eager", "triton")
        expected, actual = (SM3(p, r, backend=b, **options) for p, r, b in zip(sides, rates, backends, strict=True))

        def step(graph=None) -> None:
            for p, q, buffer, grad in zip(*sides, buffers, randn(), strict=True):
                p.grad, q.grad = grad, buffer.copy_(grad) if graph else grad.clone()
            for rate in rates:
                rate.mul_(0.9)
            expected.step()
            if graph:
                graph.replay()
            else:
                actual.step()

        step()
        step()
        assert actual.state  # whoever reads it waits for what was under way; a graph must do so nevertheless
        for q, buffer in zip(sides[1], buffers, strict=True):
            q.grad = buffer
        before = [each.clone() for each in held(sides[1], actual)]
        ((kernel,),) = [launches for launches, _ in actual._current_plan()._stages]
        with captured(kernel._work) as graph:
            actual.step()
        for each, was in zip(held(sides[1], actual), before, strict=True):  # a capture takes no step
            each.copy_(was)
        tables = (kernel._addresses, kernel._settings, kernel._made_of)
        assert [each.data_ptr() for each in graph.sent] == [each.of_graphs[0][0].data_ptr() for each in tables]
        kept = [weakref.ref(kernel), weakref.ref(kernel._work)]
        del kernel, tables
        for number in range(6):
            step(graph if number != 1 else None)
            if number == 2:
                assert actual.state
            if number == 3:
                for owner in (expected, actual):  # another plan
                    owner.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
                actual._current_plan()
                gc.collect()
                assert all(each() is not None for each in kept)
        for p, q in zip(*sides, strict=True):
            assert_same(q.detach(), p.detach(), options)
            for key, value in expected.state[p].items():
                assert_same(actual.state[q][key], value, (key, options))
        with captured(None), pytest.raises(RuntimeError, match="must first write down where its tensors lie"):
            SM3(sides[0], backend="triton").step()

    recipe = RECIPE | {"cover_block": 64, "cover_product": True, "nesterov": True, "weight_decay": 0.1}
    by_torch = patch("sm3_dist.maths.rms.looks", lambda: None)  # what the library does, as on a CPU, is not recorded
    with (
        patch.object(optimizer, "settings_of", on_gpu),
        patch.object(optimizer, "check_scheduled"),
        by_torch,
        torch.no_grad(),
    ):
        compare_graph(recipe | {"momentum_dtype": torch.int8, "rounding_seed": 3})
        compare_graph({"momentum": 0.9})


def check_touched_state() -> None:
    """State tensors that somebody moves, replaces or lays out anew between steps are those that the next step uses."""
    import torch
    from against_eager import RECIPE, assert_same
    from test_touched_state import CHANGES, train

    from sm3_dist import SM3

    recipe = RECIPE | {"cover_block": 64, "cover_product": True, "nesterov": True}
    for change in CHANGES:
        sides = []
        for backend in ("eager", "triton"):
            params = [torch.nn.Parameter(torch.ones(shape)) for shape in [(8, 64), (5,)]]
            optimizer = SM3(params, backend=backend, **recipe)
            train(optimizer, range(2))
            old = [value for state in optimizer.state.values() for value in state.values()]
            for state in optimizer.state.values():
                change(state)
            before = [value.clone() for value in old]
            train(optimizer, range(2, 4))
            if change.__name__ == "offload":  # what was replaced is nobody's any more
                assert all(map(torch.equal, old, before))
            sides.append([*(p.detach() for p in params), *(v for s in optimizer.state.values() for v in s.values())])
        for expected, actual in zip(*sides, strict=True):
            assert_same(actual, expected, change.__name__)


def check_no_elements() -> None:
    from against_eager import RECIPE, compare_without_elements

    for settings in ({}, RECIPE):
        compare_without_elements("triton", **settings)


def check_single_values() -> None:
    """Roots, reciprocals, codes and squares, as tests/gpu does it with more numbers."""
    import torch
    from single_values import CARRIERS, FIRST_SHORT, check_carriers, check_codes, check_roots, check_squares, lengths

    for start in (0, FIRST_SHORT - 1024, 0x3F800000 - 1024, 0x7F800001 - 2048):
        check_roots(start, 2048, "cpu")
    for start in (-1024, 0x39800000 - 1024, -(1 << 31), 0x7F800000 - 1024):
        check_codes(start, 2048, "cpu")
    for carrier in CARRIERS:
        near = [int(torch.tensor(length).view(torch.int32)) - 1024 for length in lengths(carrier)]
        for start in (-1024, 0x7F800000 - 1024, *near):
            check_squares(start, 2048, "cpu", carrier)
    check_carriers("cpu")


def check_averages() -> None:
    """Those of more than one program, and of some that are too few for one."""
    import torch

    from sm3_dist.kernels.triton.averages import AveragesKernel
    from sm3_dist.maths.rms import averaged

    for count in (1, 5, 300):
        generator = torch.Generator().manual_seed(count)
        before = torch.randint(-2, 1 << 62, (count,), generator=generator).clamp_(min=-1)
        before[::3] = torch.tensor([-1, 0, 400, 7])[torch.randint(0, 4, before[::3].shape, generator=generator)]
        tensors = [value.clone() for value in before.unbind()]
        kernel = AveragesKernel(count, torch.device("cpu"))
        for _ in range(2):
            sums = torch.randint(0, 1 << 62, (count,), generator=generator)
            sums[::2] *= torch.randint(0, 2, sums[::2].shape, generator=generator)
            kernel([each.data_ptr() for each in tensors], sums)
            before = averaged(before, sums)
            assert torch.equal(torch.stack(tensors), before)
            tensors[0] = tensors[0].clone()  # elsewhere


if __name__ == "__main__":
    import against_eager
    from interpreter import hurry, mend

    mend()
    hurry()
    against_eager.threads = nullcontext  # the kernel uses none
    for name in sys.argv[1:]:
        globals()[f"check_{name}"]()
    print("checked", *sys.argv[1:])
