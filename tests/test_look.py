"""How tensors are looked at: by the compiled library, and in Python where there is none."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from against_eager import needs_c
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from sm3_dist import SM3
from sm3_dist.compiled import library
from sm3_dist.compiled.look import Held, Look
from sm3_dist.maths.rms import Averages, averaged

COMPILED = pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_c), False])


def swap(tensor: Tensor) -> None:
    torch.utils.swap_tensors(tensor, tensor.clone())


def move(tensor: Tensor) -> None:
    tensor.data = tensor.data.clone()


def put_elsewhere(tensor: Tensor) -> None:
    tensor.set_(torch.zeros(5, 5))


def turn(tensor: Tensor) -> None:
    tensor.t_()


def read_as_integers(tensor: Tensor) -> None:
    tensor.data = tensor.data.view(torch.int32)


def stretch(tensor: Tensor) -> None:
    tensor.as_strided_((5, 5), (0, 1))


def flatten(tensor: Tensor) -> None:
    tensor.data = tensor.data.view(25)


MOVES = [swap, move, put_elsewhere]
FORMS = [turn, read_as_integers, stretch, flatten]


@needs_c
def test_the_compiled_library_looks() -> None:
    assert library.looks() is not None
    assert Look([torch.zeros(2)])._library is not None


@COMPILED
@pytest.mark.parametrize("number", [0, 15, 16, 40])
@pytest.mark.parametrize("change", [*MOVES, *FORMS])
def test_every_change_is_seen(change: Callable[[Tensor], None], number: int, compiled: bool) -> None:
    tensors = [torch.zeros(5, 5) for _ in range(41)]
    look = Look(tensors, compiled)
    before = look.addresses()
    assert before is not None
    assert before.tolist() == [tensor.data_ptr() for tensor in tensors]
    assert look.addresses() == before
    change(tensors[number])
    if change in FORMS:
        assert look.addresses() is None
        assert not look.is_unchanged()
        return
    now = look.addresses()
    assert now is not None
    assert now.tolist() == [tensor.data_ptr() for tensor in tensors]
    assert [i for i in range(41) if now[i] != before[i]] == [number]
    assert look.is_unchanged()


@COMPILED
def test_tensors_of_all_kinds(compiled: bool) -> None:
    shapes: list[tuple[int, ...]] = [(), (0,), (3, 0, 2), (1,) * 30, (2, 3)]
    types = [torch.float32, torch.bfloat16, torch.int64, torch.bool]
    tensors = [torch.ones(shape, dtype=dtype) for shape in shapes for dtype in types]
    look = Look(tensors, compiled)
    addresses = look.addresses()
    assert addresses is not None
    assert addresses.tolist() == [tensor.data_ptr() for tensor in tensors]
    for others in ([], tensors[:-1], [*tensors, torch.ones(())]):
        look.turn_to(others)
        assert look.addresses() is None
        assert not look.is_unchanged()
    look.turn_to([tensor.clone() for tensor in tensors])
    assert look.is_unchanged()
    look.turn_to([tensor.clone() for tensor in reversed(tensors)])
    assert not look.is_unchanged()


@COMPILED
def test_another_device_is_another_form(compiled: bool) -> None:
    look = Look([torch.ones(5, 5), torch.ones(2)], compiled)
    look.turn_to([torch.ones(5, 5), torch.ones(2, device="meta")])
    assert look.addresses() is None
    assert not look.is_unchanged()


@COMPILED
def test_a_sparse_tensor_has_another_form_and_nothing_is_printed(
    compiled: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    dense, sparse = torch.ones(5, 5), torch.ones(5, 5).to_sparse()
    look = Look([dense], compiled)
    look.turn_to([sparse])
    assert look.addresses() is None
    look.note()
    assert look.is_unchanged()
    look.turn_to([dense])
    assert not look.is_unchanged()
    assert capfd.readouterr() == ("", "")


@COMPILED
def test_whatever_dictionaries_hold(compiled: bool) -> None:
    def made() -> list[dict[str, Tensor]]:
        return [{"a": torch.ones(()), "b": torch.zeros(2)}, {}, {"a": torch.ones(())}]

    def seen(change: Callable[[list[dict[str, Tensor]]], object]) -> bool:
        dicts = made()
        held = Held(dicts, compiled)
        assert held.is_unchanged()
        change(dicts)
        return not held.is_unchanged()

    assert seen(lambda dicts: dicts[0].update(a=dicts[0]["a"].clone()))
    assert seen(lambda dicts: dicts[2].update(a=dicts[0]["a"]))
    assert seen(lambda dicts: dicts[1].update(c=torch.ones(())))
    assert seen(lambda dicts: dicts[2].update(c=torch.ones(())))
    assert seen(lambda dicts: dicts[2].clear())
    assert seen(lambda dicts: dicts[0].pop("a"))
    assert seen(lambda dicts: dicts[2].update(b=dicts[2].pop("a")))
    assert not seen(lambda dicts: dicts[2]["a"].add_(1))


@COMPILED
def test_averages_wherever_they_lie(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.tensor([0, 0, -1, -1, 400, 400, 7, 1 << 62])
    sums = torch.tensor([0, 9, 0, 7, 0, 800, 1, 1 << 62])
    if not compiled:
        monkeypatch.setattr("sm3_dist.maths.rms.looks", lambda: None)
    tensors = [value.clone() for value in before.unbind()]
    averages = Averages(tensors)
    averages.take(sums)
    assert torch.equal(torch.stack(tensors), averaged(before, sums))
    move(tensors[5])
    averages.take(sums)
    assert torch.equal(torch.stack(tensors), averaged(averaged(before, sums), sums))


def made_of_others() -> TwoTensor:
    """It has no memory of its own: its address is 0, or it is an error to ask for it."""
    return TwoTensor(torch.ones(4, 4), torch.ones(4, 4))


@needs_c
def test_a_weight_made_of_other_tensors_is_refused() -> None:
    weight = nn.Parameter(made_of_others())
    weight.grad = torch.ones(4, 4)
    with pytest.raises(ValueError, match="TwoTensor and has no memory"):
        SM3([weight], backend="c").step()
    SM3([weight], momentum=0.9).step()  # in eager PyTorch
    plain = nn.Parameter(torch.ones(4, 4))
    plain.grad = torch.ones(4, 4)
    SM3([plain], momentum=0.9).step()
    assert torch.equal(weight.a, plain)


@needs_c
def test_a_gradient_made_of_other_tensors_is_refused() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = SM3([weight], backend="c")
    for _ in range(2):
        weight.grad = torch.ones(4, 4)
        optimizer.step()
    weight.grad = made_of_others()
    with pytest.raises(TypeError, match="TwoTensor of shape"):
        optimizer.step()


AT_THE_END_OF_MEMORY = """
import ctypes, torch
from sm3_dist.compiled.library import functions_of_torch, integers, looks, place_of
from sm3_dist.compiled.look import Look

system, page = ctypes.CDLL(None), 1 << 16
system.mmap.restype = ctypes.c_void_p
system.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
system.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
start = system.mmap(None, 2 * page, 3, 0x22, -1, 0)
assert system.mprotect(start + page, page, 0) == 0
noted = Look([torch.zeros(())])._noted
end = start + page - 8 * len(noted)
ctypes.memmove(end, place_of(noted), 8 * len(noted))
for shape in [(), (5,), (5, 5, 5, 5), (1,) * 40]:
    tensor = torch.zeros(shape)
    objects = integers([id(tensor)])
    print(looks().sm3_look(place_of(functions_of_torch()), place_of(objects), 1, None, None, end))
"""


@needs_c
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for memory")
def test_no_more_is_read_than_was_noted() -> None:
    """Of a tensor that has got more dimensions the form has more words."""
    found = subprocess.run([sys.executable, "-c", AT_THE_END_OF_MEMORY], capture_output=True, text=True)
    assert (found.returncode, found.stdout.split()[1:]) == (0, ["-1"] * 3), found.stderr


def test_gradients_are_not_kept() -> None:
    weights = [nn.Parameter(torch.ones(3, 4)) for _ in range(3)]
    optimizer = SM3.adamw_like(weights)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.ones(3, 4)
        kept = [weakref.ref(weight.grad) for weight in weights]
        optimizer.step()
        optimizer.zero_grad()
        assert [each() for each in kept] == [None] * 3
