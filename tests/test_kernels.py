"""Every backend against the eager one, which is the definition: the same bits, whatever the tensor and its values."""

import os
import shutil
import sys
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from sm3_dist import SM3, kernels
from sm3_dist.kernels.c import backend as cpu
from sm3_dist.kernels.eager import EagerKernel
from sm3_dist.layout.box import Box, flat_boxes
from sm3_dist.layout.shard import LocalShard
from sm3_dist.maths.rms import square_sum
from sm3_dist.maths.update import Settings
from sm3_dist.step.entry import HYPERPARAMETERS, Entry

# Where there is a compiler, a library that is not there is a failure and no reason to skip.
COMPILER = shutil.which("gcc") or shutil.which("clang")
needs_c = pytest.mark.skipif(
    kernels.available()["c"] is not None and COMPILER is None, reason=str(kernels.available()["c"])
)

# Ranks 0 to 6; rows that end in every place of a vector; long and short rows; few rows that threads must share.
SHAPES = [
    *[(), (1,), (7,), (1025,), (5000,), (0,)],
    *[(64, 64), (33, 17), (3, 1000), (1, 3000), (3000, 1), (200, 7), (60, 8500), (6, 9000), (0, 5), (5, 0), (1, 1)],
    *[(2, 3, 5), (40, 8, 700), (9, 1, 130), (64, 32, 3, 3), (64, 1, 3, 3), (4, 5, 6, 7, 8), (2, 2, 2, 2, 2, 2)],
]
RECIPE = {"momentum": 0.9, "beta": 0.95, "bias_correction": True, "update_rms": 0.2}
SETTINGS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "momentum_dtype": torch.bfloat16},
    {"beta": 0.95, "weight_decay": 0.1, "maximize": True},
    {"beta": 0.9, "momentum": 0.8, "maximize": True, "eps": 1e-8, "weight_decay": 0.01},
    {"eps": 0.0},
    {"lr": torch.tensor(0.3), "maximize": True},
    {"momentum": 0.9, "beta": 0.95, "bias_correction": True, "nesterov": True, "weight_decay": 0.1},
    {"beta": 0.9, "update_rms": 0.2, "maximize": True, "eps": 0.0},
    RECIPE,
    RECIPE | {"momentum_dtype": torch.bfloat16, "nesterov": True, "maximize": True, "weight_decay": 0.1},
    RECIPE | {"cover_block": 32, "cover_product": True},
    {"beta": 0.95, "cover_block": 3, "eps": 0.0},
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_same(actual: Tensor, expected: Tensor, what: object) -> None:
    """Equal to the bit, but that one NaN is as good as another."""
    assert actual.dtype == expected.dtype, what
    assert torch.equal(actual.isnan(), expected.isnan()), f"NaN in different places: {what}"
    same = actual.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    assert torch.equal(same, expected.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)), what


def gradient(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, special: bool = False) -> Tensor:
    """Values of all magnitudes, zeros and denormals among them; ``special``: also infinities and NaN."""
    values = torch.randn(shape, generator=generator)
    which = torch.rand(shape, generator=generator)
    limits = torch.finfo(dtype)
    for low, high, factor in [(0.0, 0.1, 0.0), (0.1, 0.2, limits.smallest_normal / 64), (0.2, 0.3, limits.max / 8)]:
        values = torch.where((which >= low) & (which < high), values * factor, values)
    if special:
        for low, value in [(0.500, torch.nan), (0.501, torch.inf), (0.502, -torch.inf)]:
            values = values.masked_fill((which >= low) & (which < low + 0.001), value)
    return values.to(dtype)


@pytest.fixture(autouse=True)
def _one_thread():
    """Eager operations of this size gain nothing from threads; the C backend gets them where it is called."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def threads(number: int):
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(1)


def compare(weights: list[Tensor], grads: list[list[Tensor | None]], fused: str = "c", **settings) -> None:
    """Step copies of the weights in both backends, and compare everything after every step."""
    expected = [nn.Parameter(w.clone()) for w in weights]
    actual = [nn.Parameter(torch.empty_strided(w.shape, w.stride(), dtype=w.dtype).copy_(w)) for w in weights]
    optimizers = SM3(expected, backend="eager", **settings), SM3(actual, backend=fused, **settings)
    for number, of_step in enumerate(grads):
        for p, q, grad in zip(expected, actual, of_step, strict=True):
            p.grad, q.grad = (None, None) if grad is None else (grad.clone(), grad)
        optimizers[0].step()
        with threads((1, 2, 5, 3)[number % 4]):
            optimizers[1].step()
        for p, q in zip(expected, actual, strict=True):
            assert_same(q.detach(), p.detach(), ("weight", number, tuple(p.shape)))
            state = optimizers[1].state[q]
            for key, value in optimizers[0].state[p].items():
                assert_same(state[key], value, (key, number, tuple(p.shape)))


@needs_c
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_c_backend_gives_the_bits_of_eager(dtype, settings):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    grads = [[gradient(s, dtype, generator, special) for s in SHAPES] for special in (False, False, True, False)]
    compare(weights, grads, **settings)


@needs_c
@pytest.mark.parametrize("settings", [{"momentum": 0.9}, RECIPE | {"cover_block": 32, "cover_product": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stochastic_rounding(dtype, settings):
    generator = torch.Generator().manual_seed(0)
    shapes = [s for s in SHAPES if len(s) < 2 or 1 not in s]  # dimensions of length 1 are moved to the end
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    grads = [[gradient(s, dtype, generator, special) for s in shapes] for special in (False, False, True)]
    narrow = {"momentum_dtype": torch.bfloat16, "stochastic_rounding": True, "rounding_seed": (1 << 63) + 12345}
    compare(weights, grads, **settings, **narrow)


@needs_c
def test_gradients_may_be_missing_in_any_step():
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 40), (7,), (50, 6, 5), (64, 64)]
    weights = [torch.randn(s, generator=generator) for s in shapes]
    grads = [[None if (i + n) % 3 == 0 else torch.randn(s) for i, s in enumerate(shapes)] for n in range(5)]
    compare(weights, [*grads, [None] * 4], momentum=0.9)


@needs_c
def test_memory_may_be_misaligned_strided_or_permuted():
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    weights = [
        randn(101)[1:],
        randn(40 * 33 + 3)[3:].view(40, 33),
        randn(40, 50).t(),
        randn(40, 50)[:, 3:40],
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
    for settings in ({}, {"momentum": 0.9}, {"cover_block": 3}, RECIPE | {"cover_block": 4, "cover_product": True}):
        compare_views(weights, grads, **settings)


def compare_views(weights: list[Tensor], grads: list[list[Tensor]], fused: str = "c", **settings) -> None:
    """As ``compare``, but the actual weights are views with gaps, whose surroundings must stay as they are."""
    expected = [nn.Parameter(w.clone()) for w in weights]
    bases = [(w._base if w._base is not None else w).clone() for w in weights]
    actual = [
        nn.Parameter(base.as_strided(w.shape, w.stride(), w.storage_offset()))
        for base, w in zip(bases, weights, strict=True)
    ]
    before = [base.clone() for base in bases]
    optimizers = SM3(expected, backend="eager", **settings), SM3(actual, backend=fused, **settings)
    for of_step in grads:
        for p, q, grad in zip(expected, actual, of_step, strict=True):
            p.grad, q.grad = grad.clone(), grad
        for optimizer in optimizers:
            optimizer.step()
    for p, q, base, old in zip(expected, actual, bases, before, strict=True):
        assert_same(q.detach(), p.detach(), q.stride())
        inside = torch.zeros_like(base, dtype=torch.bool)
        inside.as_strided(q.shape, q.stride(), q.storage_offset()).fill_(True)
        assert torch.equal(base[~inside], old[~inside])


@needs_c
@pytest.mark.parametrize(
    "shape", [(10, 7), (100, 300), (6, 5, 4), (40, 30, 20), (5, 4, 3, 2), (3, 4, 1, 5, 2)], ids=str
)
@pytest.mark.parametrize("replicated", [False, True])
def test_boxes_of_flat_ranges(shape, replicated):
    for block, is_product in ((None, False), (3, False), (2, True), (32, True)):
        compare_boxes(shape, replicated, cpu.CKernel, 6, block, is_product)


@torch.no_grad()
def compare_boxes(
    shape: tuple[int, ...],
    replicated: bool,
    fused: type[kernels.Kernel],
    ranges: int,
    block: int | None = None,
    is_product: bool = False,
) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    numel = torch.Size(shape).numel()
    for _ in range(ranges):
        a, b = sorted(torch.randint(0, numel + 1, (2,), generator=generator).tolist())
        boxes = tuple(flat_boxes(shape, a, b))
        if not boxes:
            continue
        shard = LocalShard(shape, boxes, 3, replicated=replicated, cover_block=block)
        size = shape if replicated else (b - a + 5,)
        weight, grad = torch.randn(size, generator=generator), torch.randn(size, generator=generator)
        group = dict.fromkeys(HYPERPARAMETERS) | {"momentum": 0.9, "beta": 0.0}
        if is_product:  # then as the recipe has it: updates are scaled, and their squares added up
            group |= {"beta": 0.95, "bias_correction": True, "update_rms": 1.0}
        settings = Settings(0.1, 0.9, group["beta"], 1e-30, 0.1, False, cover_product=is_product)
        results = []
        for work in (EagerKernel, fused):
            param = nn.Parameter(weight.clone())
            param.grad = grad.clone()
            accumulators = [
                torch.rand(s.shape, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shard.stored)
            ]
            moment = torch.zeros(b - a if replicated else size)
            squares = square_sum(shape, torch.zeros((), dtype=torch.int64)) if is_product else None
            entry = Entry(param, group, shard, accumulators, moment, torch.ones(()), squares, "x")
            running = work([entry])
            for number in (2, 5):
                with threads(number):
                    running.update({id(group): settings})
                if squares is not None:
                    squares.average.copy_(squares.partial)
            sums = [] if squares is None else [squares.partial]
            results.append([param.detach(), *accumulators, moment, entry.step, *sums])
        for i, (expected, actual) in enumerate(zip(*results, strict=True)):
            assert_same(actual, expected, (i, boxes))


@needs_c
@pytest.mark.parametrize("options", [{}, RECIPE | {"nesterov": True}], ids=["plain", "recipe"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_every_vector_width(dtype, options):
    generator = torch.Generator().manual_seed(1)
    shape, group = (37, 131), dict.fromkeys(HYPERPARAMETERS) | {"momentum": 0.9, "beta": 0.95} | options
    settings = Settings(0.1, 0.9, 0.95, 1e-30, 0.1, False, bool(options))
    weight, grad = torch.randn(shape, generator=generator).to(dtype), gradient(shape, dtype, generator, special=True)
    results = []
    for width in [None, *cpu.widths()]:
        param = nn.Parameter(weight.clone())
        param.grad = grad
        shard = LocalShard(shape, (Box.whole(shape),))
        accumulators = [torch.zeros(s.shape) for s in shard.stored]
        moment = torch.zeros(shape, dtype=torch.bfloat16)
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
def test_every_float16_and_bfloat16_value_is_read_and_written_right():
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        zero = [torch.zeros_like(every)]
        compare([every], [zero], lr=0.0)
        compare([torch.zeros_like(every)], [[every]], lr=1.0)
        between = torch.randn(2**15, generator=torch.Generator().manual_seed(0)).to(dtype)
        compare([between], [[gradient((2**15,), dtype, torch.Generator().manual_seed(1))]], lr=1e-3)


@needs_c
@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)], ids=str)
def test_halves_round_to_even(dtype, step):
    for odd in (1, 3):  # in the middle between two neighbours; the first update is the sign of the gradient
        compare([torch.zeros(40, dtype=dtype)], [[torch.ones(40, dtype=dtype)]], lr=1 + odd * step)


@needs_c
@torch.no_grad()
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
        for param.grad in (grad, grad.bfloat16(), grad * 2):
            running.update({id(group): Settings(0.1, 0.0, 0.0, 1e-30, 0.0, False)})
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


@needs_c
def test_auto_leaves_to_eager_what_c_does_not_take():
    def params():
        torch.manual_seed(0)
        embedding = nn.Embedding(50, 8, sparse=True)
        return [nn.Parameter(torch.randn(9, 9, dtype=torch.float64)), nn.Parameter(torch.randn(9, 9)), embedding.weight]

    sides = params(), params()
    optimizers = [SM3(ps, backend=b) for ps, b in zip(sides, ("eager", "auto"), strict=True)]
    for step in range(3):
        for ps, optimizer in zip(sides, optimizers, strict=True):
            torch.manual_seed(step)
            (ps[0].square().sum() + (ps[1] * torch.randn(9, 9)).sum()).backward()
            nn.functional.embedding(torch.tensor([1, 4, 4]), ps[2], sparse=True).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(*sides, strict=True):
        assert_same(q.detach(), p.detach(), p.dtype)
        for key, value in optimizers[0].state[p].items():
            assert_same(optimizers[1].state[q][key], value, key)


@needs_c
def test_c_alone_says_why_it_cannot_take_a_tensor():
    weight = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match=r"backend='c' cannot step parameter 0 .*\(3, 4\): it is torch.float64"):
        SM3([weight], backend="c").step()


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"'auto', 'eager', 'c', 'triton', but is 'cuda'"):
        SM3([nn.Parameter(torch.ones(2))], backend="cuda")


def test_without_the_compiled_library_eager_serves_and_one_warning_says_why(monkeypatch):
    monkeypatch.setattr(cpu.importlib.machinery, "EXTENSION_SUFFIXES", [".missing"])
    for cached in (cpu._library, cpu._warn_once):
        cached.cache_clear()
    try:
        assert "C compiler" in str(kernels.available()["c"])
        weight = nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        with pytest.warns(UserWarning, match="C compiler"):
            SM3([weight], lr=0.5).step()
        assert torch.equal(weight.detach(), torch.full((3,), 0.5))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            SM3([weight]).step()
        with pytest.raises(ValueError, match="C compiler"):
            SM3([weight], backend="c").step()
    finally:
        for cached in (cpu._library, cpu._warn_once):
            cached.cache_clear()


@needs_c
@pytest.mark.parametrize("settings", [{"momentum": 0.9}, RECIPE | {"cover_block": 32}], ids=str)
def test_threads_of_its_own_do_as_those_of_pytorch(settings, monkeypatch):
    monkeypatch.setattr(cpu, "_parallel", lambda process: None)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in SHAPES]
    compare(weights, [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(4)], **settings)


@needs_c
@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has another OpenMP runtime")
def test_pytorchs_threads_are_found_but_not_after_a_fork():
    assert cpu._parallel(os.getpid()) is not None
    assert cpu._parallel(os.getpid() + 1) is None


@needs_c
def test_a_fork_after_a_step_can_step_too():
    """PyTorch's threads are lost in a fork, and waiting for them would not end."""
    weight = nn.Parameter(torch.ones(300, 300))
    weight.grad = torch.ones(300, 300)
    optimizer = SM3([weight], lr=0.1, backend="c")
    with threads(2):
        optimizer.step()
        child = os.fork()
        if child == 0:
            optimizer.step()
            os._exit(0 if weight[299, 299].item() < 0.9 else 1)
        optimizer.step()
    assert os.waitpid(child, 0)[1] == 0
