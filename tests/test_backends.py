"""Which backend serves: what is left to eager, what is refused, what is said."""

import warnings

import pytest
import torch
from against_eager import assert_same, needs_c
from torch import nn

from sm3_dist import SM3, kernels
from sm3_dist.compiled import library, sources
from sm3_dist.kernels.c import backend as cpu

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_a_kernel_has_the_tensors_of_one_device(monkeypatch):
    """A model may lie on several GPUs, and what runs on one has no memory of another."""
    given = []
    monkeypatch.setattr(kernels, "_FUSED", [("triton", lambda entry: None, given.append)])
    params = [nn.Parameter(torch.ones(2, device=device)) for device in ("cpu", "meta", "cpu")]
    SM3(params, backend="triton")._current_plan()
    assert [[entry.param.device.type for entry in entries] for entries in given] == [["cpu", "cpu"], ["meta"]]


def test_one_warning_names_all_that_a_gpu_leaves_to_eager(monkeypatch):
    def told(backend):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = SM3(params, backend=backend)
            for _ in range(2):
                optimizer.step()
        return [str(each.message) for each in caught]

    shapes, types = [(40, 30), (2, 3), *[(1025 + k,) for k in range(12)]], [torch.float64] * 2 + [torch.float32] * 12
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape, dtype in zip(shapes, types, strict=True)]
    for param in params:
        param.grad = torch.ones_like(param)
    assert told("auto") == []
    monkeypatch.setattr(kernels, "_on_gpu", lambda entry: True)
    (words,) = told("auto")
    assert "steps 13 of 14 tensors on the GPU in eager PyTorch, up to a hundred times slower" in words
    reason = kernels.available()["triton"]
    first, *rest = words.splitlines()[1:]
    assert first.startswith(f"{reason} (parameter 0 of param group 0 of shape (40, 30), parameter 2 of")
    assert first.endswith("of shape (1033,) and 3 more)")
    assert rest == []
    monkeypatch.setattr(kernels.triton, "refusal", lambda entry: f"it is {entry.param.dtype}.")
    (words,) = told("auto")
    assert [line.split(" (")[0] for line in words.splitlines()[1:]] == ["it is torch.float64.", "it is torch.float32."]
    assert told("eager") == []


def test_on_a_gpu_a_warning_tells_that_many_tensors_are_looked_at_in_python(monkeypatch):
    def told(count):
        optimizer = SM3([nn.Parameter(torch.ones(3)) for _ in range(count)], backend="eager")
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                optimizer.step()
        return [str(each.message) for each in caught]

    monkeypatch.setattr(kernels, "_on_gpu", lambda entry: True)
    monkeypatch.setattr(kernels, "no_look", lambda: None)
    assert told(kernels.MANY + 1) == []
    monkeypatch.undo()
    monkeypatch.setattr(library, "looks", lambda: None)
    assert told(kernels.MANY + 1) == []
    monkeypatch.setattr(kernels, "_on_gpu", lambda entry: True)
    assert told(kernels.MANY) == []
    (words,) = told(kernels.MANY + 1)
    assert "looks in Python at 257 tensors on the GPU" in words
    assert "does not tell it where tensors lie" in words or "C compiler" in words


@pytest.mark.parametrize(("backend", "asked"), [("auto", 1), ("eager", 0)])
def test_averages_of_squares_are_brought_up_to_date_by_the_backend(monkeypatch, backend, asked):
    calls = []

    def make_averages(count, device):
        assert (count, device.type) == (2, "cpu")
        return lambda addresses, sums: calls.append((list(addresses), sums.tolist()))

    monkeypatch.setattr(kernels.triton, "make_averages", make_averages)
    params = [nn.Parameter(torch.ones(shape)) for shape in [(40, 30), (7,)]]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = SM3.adamw_like(params, backend=backend)
    for _ in range(2):
        optimizer.step()
    averages = [state["update_square_average"] for state in optimizer.state.values()]
    assert [each.item() != 0 for each in averages] == [not asked] * 2
    assert [addresses for addresses, _ in calls] == [[each.data_ptr() for each in averages]] * 2 * asked
    assert all(min(sums) > 0 for _, sums in calls)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"'auto', 'eager', 'c', 'triton', but is 'cuda'"):
        SM3([nn.Parameter(torch.ones(2))], backend="cuda")


def test_without_the_compiled_library_eager_serves_and_one_warning_says_why(monkeypatch):
    monkeypatch.setattr(library.importlib.machinery, "EXTENSION_SUFFIXES", [".missing"])
    for cached in (library.library, library.looks, cpu._warn_once):
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
        for cached in (library.library, library.looks, cpu._warn_once):
            cached.cache_clear()


@needs_c
def test_a_library_of_other_sources_is_not_used(monkeypatch):
    assert not isinstance(library.library.__wrapped__(), str)
    other = sources.checksum() ^ 1
    monkeypatch.setattr(sources, "checksum", lambda: other)
    assert "other sources" in library.library.__wrapped__()
