"""Every backend against the eager one, which is the definition: the same bits, whatever the tensor and its values."""

from functools import partial

import pytest
import torch
from against_eager import (
    DTYPES,
    RECIPE,
    SETTINGS,
    SHAPES,
    assert_same,
    compare,
    compare_boxes,
    compare_views,
    compare_without_elements,
    gradient,
    needs_c,
)
from torch import nn

from sm3_dist import SM3, kernels
from sm3_dist.kernels.c import backend as cpu
from sm3_dist.kernels.eager import EagerKernel
from sm3_dist.layout.box import Box
from sm3_dist.layout.shard import LocalShard
from sm3_dist.maths.rms import square_sum
from sm3_dist.maths.update import Settings
from sm3_dist.step.entry import HYPERPARAMETERS, Entry

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDED = RECIPE | {"nesterov": True, "stochastic_rounding": True, "rounding_seed": 5}
SHAPE_IN_BLOCKS = (138, 960)
"""Rows of whole groups, which the fastest loop on x86-64 takes."""


@needs_c
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_c_backend_gives_the_bits_of_eager(dtype, settings):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    grads = [[gradient(s, dtype, generator, special) for s in SHAPES] for special in (False, False, True, False)]
    compare(weights, grads, **settings)


@needs_c
@pytest.mark.parametrize("settings", [{}, RECIPE | {"momentum_dtype": torch.int8, "rounding_seed": 3}], ids=str)
@pytest.mark.parametrize("shape", [(4, 1024, 3, 3), (9, 150, 63), (33, 2, 300, 40), (2, 9000, 1)], ids=str)
def test_short_rows_that_make_no_long_row_together(shape, settings):
    """Those of one index of dimension 0 are too many to be joined to a row, and several are worked through as one."""
    generator = torch.Generator().manual_seed(0)
    compare([torch.randn(shape, generator=generator)], [[torch.randn(shape, generator=generator)]] * 4, **settings)


@needs_c
@pytest.mark.parametrize("settings", [{}, {"beta": 0.9}, RECIPE | {"cover_block": None}], ids=str)
def test_what_was_written_into_accumulators_of_no_elements(settings):
    compare_without_elements(**settings)


@needs_c
@pytest.mark.parametrize("settings", [{}, {"cover_block": 8, "cover_product": True}], ids=str)
def test_what_has_no_elements_and_no_entries_takes_no_time(settings, monkeypatch):
    shapes = [(0,), (0, 0)] + [(0, 5), (5, 0), (3, 0, 2)] * ("cover_block" in settings)
    params = [nn.Parameter(torch.empty(shape)) for shape in shapes]
    optimizer = SM3(params, backend="c", **settings)
    monkeypatch.setattr(Entry, "update", lambda *_: pytest.fail("stepped in eager PyTorch"))
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer.step()
    assert all(optimizer.state[param]["step"] == 1 for param in params)


@needs_c
@pytest.mark.parametrize("settings", [{"momentum": 0.9}, RECIPE | {"cover_block": 32, "cover_product": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_stochastic_rounding(dtype, momentum_dtype, settings):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    grads = [[gradient(s, dtype, generator, special) for s in SHAPES] for special in (False, False, True)]
    narrow = {"momentum_dtype": momentum_dtype, "rounding_seed": (1 << 63) + 12345}
    narrow["stochastic_rounding"] = dtype != torch.float16  # which it does not take
    compare(weights, grads, **settings, **narrow)


@needs_c
def test_gradients_may_be_missing_in_any_step():
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 40), (7,), (50, 6, 5), (64, 64)]
    weights = [torch.randn(s, generator=generator) for s in shapes]
    grads = [[None if (i + n) % 3 == 0 else torch.randn(s) for i, s in enumerate(shapes)] for n in range(5)]
    compare(weights, [*grads, [None] * 4], momentum=0.9)


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_may_be_misaligned_strided_or_permuted(dtype):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    weights = [
        randn(101)[1:],
        randn(40 * 33 + 3)[3:].view(40, 33),
        randn(40, 50).t(),
        randn(40, 50)[:, 3:40],
        randn(80)[::2],
        randn(50, 40)[::2, ::3],
        randn(30, 5, 10, 4)[::2, :, 3:6, ::2],
        randn(8, 6, 5, 4).to(memory_format=torch.channels_last),
        randn(30, 20, 10).permute(1, 2, 0),
    ]
    grads = []
    for _ in range(3):
        like = [torch.empty_like(w).copy_(randn(*w.shape)) for w in weights]
        grads.append([g if g.stride() == w.stride() else g.contiguous() for g, w in zip(like, weights, strict=True)])
    grads.append([randn(*w.shape) for w in weights])  # not the strides of the weights: copied
    grads.append([randn(*w.shape[::-1]).permute(*range(w.dim() - 1, -1, -1)) for w in weights])
    grads.append([randn(*w.shape[:-1], 1).expand(w.shape) for w in weights])
    product = RECIPE | {"cover_block": 4, "cover_product": True}
    narrow = {"momentum_dtype": torch.int8, "stochastic_rounding": True, "rounding_seed": 3}
    for settings in ({}, {"momentum": 0.9}, {"cover_block": 3}, product, product | narrow, {"momentum": 0.9} | narrow):
        compare_views(weights, grads, **settings)


@needs_c
@pytest.mark.parametrize(
    "shape", [(10, 7), (100, 300), (6, 5, 4), (40, 30, 20), (5, 4, 3, 2), (3, 4, 1, 5, 2), (4, 300, 30)], ids=str
)
@pytest.mark.parametrize("replicated", [False, True])
def test_boxes_of_flat_ranges(shape, replicated):
    for block, is_product in ((None, False), (3, False), (2, True), (32, True)):
        compare_boxes(shape, replicated, cpu.CKernel, 6, block, is_product)


@needs_c
@pytest.mark.parametrize("shape", [(9, 7), (30, 301), (6, 5, 7), (3, 4, 1, 5, 2)], ids=str)
def test_boxes_of_flat_ranges_that_are_rounded_stochastically(shape):
    """Rows begin in the middle of a word of the generator, and end there."""
    for width in cpu.widths():
        for block, is_product in ((None, False), (3, False), (2, True)):
            compare_boxes(shape, True, partial(cpu.CKernel, width=width), 6, block, is_product, is_random=True)


@needs_c
@pytest.mark.parametrize(
    ("options", "block", "moment_dtype", "shape"),
    [
        ({}, None, torch.bfloat16, (37, 131)),
        (RECIPE | {"nesterov": True}, None, torch.bfloat16, (37, 131)),
        (RECIPE | {"nesterov": True}, 64, torch.float32, SHAPE_IN_BLOCKS),
        (ROUNDED, 64, torch.bfloat16, SHAPE_IN_BLOCKS),
        (ROUNDED, 64, torch.int8, SHAPE_IN_BLOCKS),
        (ROUNDED, 64, torch.int8, (70, 192)),
        (RECIPE | {"nesterov": True}, 64, torch.float32, (67, 1000)),
        (ROUNDED, 64, torch.int8, (67, 1000)),
        (RECIPE | {"nesterov": True}, 64, torch.bfloat16, (2, 33000)),
        (ROUNDED, 64, torch.int8, (2, 9000)),
    ],
    ids=[
        *["plain", "slices", "blocks", "bfloat16 momentum, rounded", "codes", "codes of short rows"],
        *["rows that end in part of a block", "codes of such rows", "two panels", "codes in two panels"],
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_every_vector_width(dtype, options, block, moment_dtype, shape):
    if dtype == torch.float16 and options:  # which is not rounded so
        options = options | {"stochastic_rounding": False}
    generator = torch.Generator().manual_seed(1)
    group = dict.fromkeys(HYPERPARAMETERS) | {"momentum": 0.9, "beta": 0.95} | options
    numbers = {"nesterov": bool(options), "cover_product": block is not None, "old": 0.95, "new": 0.05}
    settings = Settings(0.1, 0.9, 1e-30, 0.1, False, **numbers)
    weight, grad = torch.randn(shape, generator=generator).to(dtype), gradient(shape, dtype, generator, special=True)
    results = []
    for width in [None, *cpu.widths()]:
        param = nn.Parameter(weight.clone())
        param.grad = grad
        shard = LocalShard(shape, (Box.whole(shape),), cover_block=block)
        accumulators = [torch.zeros(s.shape) for s in shard.stored]
        moment = torch.zeros(shape, dtype=moment_dtype)
        squares = square_sum(shape, torch.zeros((), dtype=torch.int64)) if options else None
        entry = Entry(param, group, shard, accumulators, moment, torch.zeros(()), squares, "x")
        work = EagerKernel([entry]) if width is None else cpu.CKernel([entry], width)
        for _ in range(3):
            work.update({id(group): settings})
            if squares is not None:
                squares.average.copy_(squares.partial)
        results.append([param.detach(), *accumulators, moment, *([squares.partial] if squares else [])])
    for width, result in zip(cpu.widths(), results[1:], strict=True):
        for expected, actual in zip(results[0], result, strict=True):
            assert_same(actual, expected, width)


@needs_c
@pytest.mark.parametrize("scale", [1.0, 1e-38], ids=["usual", "denormal"])
@torch.no_grad()
def test_bfloat16_of_any_bits_in_every_width(scale):
    """An instruction that rounds to bfloat16 takes denormals for 0, and has its own way with NaN."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    weight, moment = patterns.view(256, 256), patterns.view(256, 256).t().contiguous()
    group = dict.fromkeys(HYPERPARAMETERS) | {"momentum": 0.9, "beta": 0.95}
    settings = Settings(0.37 * scale, 0.9, 1e-30, 0.0, False, nesterov=True, cover_product=True, old=0.95, new=0.05)
    results = []
    for width in [None, *cpu.widths()]:
        param, buffer = nn.Parameter(weight.clone()), moment.clone()
        param.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        shard = LocalShard((256, 256), (Box.whole((256, 256)),), cover_block=64)
        accumulators = [torch.zeros(s.shape) for s in shard.stored]
        entry = Entry(param, group, shard, accumulators, buffer, torch.zeros(()), None, "x")
        work = EagerKernel([entry]) if width is None else cpu.CKernel([entry], width)
        work.update({id(group): settings})
        results.append([param.detach(), buffer])
    changed = results[0][0].view(torch.int16) != weight.view(torch.int16)
    assert changed.float().mean() > 0.1
    for width, result in zip(cpu.widths(), results[1:], strict=True):
        for expected, actual in zip(results[0], result, strict=True):
            assert torch.equal(actual.isnan(), expected.isnan()), width
            bits = [each.masked_fill(expected.isnan(), 0).view(torch.int16) for each in (actual, expected)]
            assert torch.equal(*bits), width


@needs_c
@pytest.mark.parametrize("block", [None, 64])
def test_nan_has_no_sign_in_accumulators(block):
    weight = nn.Parameter(torch.ones(SHAPE_IN_BLOCKS))
    weight.grad = torch.ones(SHAPE_IN_BLOCKS)
    weight.grad[3, 5:6].view(torch.int32).fill_(-1)
    optimizer = SM3.adamw_like([weight], backend="c", cover_block=block)
    optimizer.step()
    entries = [value for key, value in optimizer.state[weight].items() if "accumulator" in key]
    assert [int(each.isnan().sum()) for each in entries] == [1] * len(entries)
    assert all((each.view(torch.int32) >= 0).all() for each in entries)


@needs_c
@pytest.mark.parametrize("shape", [(64, 8192), (70, 8256), (3, 33000), (1024, 64), SHAPE_IN_BLOCKS], ids=str)
def test_sums_hold_the_longest_squares_of_many_rows(shape, monkeypatch):
    """NaN counts as the largest square. Vectors add those up in lanes of 32 bits, which hold some rows' alone."""
    averages, names = [], cpu.widths()
    for widest in range(len(names) + 1):
        monkeypatch.setattr(cpu, "widths", lambda widest=widest: names[:widest])
        weight = nn.Parameter(torch.ones(shape))
        weight.grad = torch.full(shape, torch.nan)
        optimizer = SM3.adamw_like([weight], backend="c" if widest else "eager")
        for _ in range(2):  # the first sum is left out
            optimizer.step()
        averages.append(optimizer.state[weight]["update_square_average"].item())
    assert set(averages) == {averages[0]}


@needs_c
def test_every_float16_and_bfloat16_value_is_read_and_written_right():
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        zero = [torch.zeros_like(every)]
        compare([every], [zero], lr=0.0)
        compare([torch.zeros_like(every)], [[every]], lr=1.0)
        between = torch.randn(2**15, generator=torch.Generator().manual_seed(0)).to(dtype)
        compare([between], [[gradient((2**15,), dtype, torch.Generator().manual_seed(1))]], lr=1e-3)


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_code_is_read_and_written_right(dtype):
    """In the loop that takes them as they are, and in the one that is told what they stand for."""
    every = torch.arange(-128, 128, dtype=torch.int32).to(torch.int8)
    for shape in (SHAPE_IN_BLOCKS, (33, 17)):
        generator, results = torch.Generator().manual_seed(0), []
        grads = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
        for backend in ("eager", "c"):
            weight = nn.Parameter(torch.ones(shape, dtype=dtype))
            optimizer = SM3.adamw_like([weight], lr=0.01, backend=backend, momentum_dtype=torch.int8)
            for number, grad in enumerate(grads):
                if number:  # each code beside other codes, and small updates, which most of them outlive
                    buffer = optimizer.state[weight]["momentum_e3m4"]
                    buffer.copy_(every.repeat(buffer.numel() // 256 + 1)[: buffer.numel()].view(shape))
                weight.grad = grad
                optimizer.step()
            results.append((weight.detach(), *optimizer.state[weight].values()))
        for expected, actual in zip(*results, strict=True):
            assert_same(actual, expected, shape)


@needs_c
@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)], ids=str)
def test_halves_round_to_even(dtype, step):
    for odd in (1, 3):  # in the middle between two neighbours; the first update is the sign of the gradient
        compare([torch.zeros(40, dtype=dtype)], [[torch.ones(40, dtype=dtype)]], lr=1 + odd * step)


@needs_c
@torch.no_grad()
@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="gradients are of the parameter's type up to 2.9")
def test_float32_gradients_of_narrow_parameters_are_not_rounded():
    generator = torch.Generator().manual_seed(0)
    shape, group = (20, 30), dict.fromkeys(HYPERPARAMETERS)
    weight, grad = torch.randn(shape, generator=generator).bfloat16(), torch.randn(shape, generator=generator)
    results = []
    for work in (EagerKernel, cpu.CKernel):
        param = nn.Parameter(weight.clone())
        param.grad_dtype = None
        param.grad = grad
        shard = LocalShard(shape, (Box.whole(shape),))
        accumulators = [torch.zeros(s.shape) for s in shard.stored]
        entry = Entry(param, group, shard, accumulators, None, torch.zeros(()), None, "x")
        running = work([entry])
        for param.grad in (grad, grad, grad.bfloat16(), grad * 2):
            running.update({id(group): Settings(0.1, 0.0, 1e-30, 0.0, False)})
        results.append([param.detach(), *accumulators])
    for expected, actual in zip(*results, strict=True):
        assert_same(actual, expected, "float32 gradient")


@needs_c
def test_weights_may_move_to_other_memory_or_another_type():
    weights = [nn.Parameter(torch.ones(30, 20)) for _ in range(2)]
    optimizers = [SM3([w], lr=0.1, backend=b) for w, b in zip(weights, ("eager", "c"), strict=True)]
    generator = torch.Generator().manual_seed(0)
    for change in (lambda t: t, torch.clone, torch.Tensor.bfloat16, lambda t: t.float().t().contiguous().t()):
        grad = torch.randn(30, 20, generator=generator)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = None
            weight.data = change(weight.data)
            weight.grad = torch.empty_like(weight.data).copy_(grad)
            optimizer.step()
        assert_same(weights[1].detach(), weights[0].detach(), change)


def test_what_a_gpu_leaves_to_eager_is_named(monkeypatch):
    monkeypatch.setattr(kernels, "_on_gpu", lambda entry: True)
    monkeypatch.setattr(kernels.triton, "refusal", lambda entry: "it is torch.float64.")
    large, small = (nn.Parameter(torch.ones(n, 40, dtype=torch.float64)) for n in (40, 2))
    large.grad, small.grad = torch.ones_like(large), torch.ones_like(small)
    message = r"(?s)1 of 2 tensors on the GPU in eager PyTorch.*it is torch.float64. \(parameter 1 .*\(40, 40\)\)"
    with pytest.warns(UserWarning, match=message) as told:
        SM3([small, large]).step()
    assert len(told) == 1
