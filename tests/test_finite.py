"""Which tensors are not finite: what the compiled library finds, and PyTorch where it leaves them to it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from against_eager import needs_c, threads
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from sm3_dist.compiled import search as searching
from sm3_dist.compiled.search import search
from sm3_dist.maths.finite import not_finite

PART = 1 << 16
"""Elements that a thread looks at in one go; see ``finite.h``."""
TYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGERS = {2: torch.int16, 4: torch.int32}
BAD = [math.nan, -math.nan, math.inf, -math.inf]


@pytest.fixture(params=[pytest.param(True, marks=needs_c), False], ids=["compiled", "without"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether there is a library."""
    if not request.param:
        monkeypatch.setattr(searching, "looks", lambda: None)
    return bool(request.param)


def check(tensors: Sequence[Tensor]) -> list[int]:
    """What is found, which is what PyTorch says of each element."""
    found = not_finite(tensors)
    assert found.dtype == torch.int32
    assert found.shape == (len(tensors),)
    expected = [int(not tensor.isfinite().all()) for tensor in tensors]
    assert found.tolist() == expected
    return expected


def of_bits(bits: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """One tensor for each pattern of bits."""
    return list(bits.to(INTEGERS[dtype.itemsize]).view(dtype).view(-1, 1).unbind())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("compiled")
def test_every_number_of_16_bits(dtype: torch.dtype) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15)
    specials = {torch.bfloat16: 2 << 7, torch.float16: 2 << 10}
    assert sum(check(of_bits(bits, dtype))) == specials[dtype]


@pytest.mark.usefixtures("compiled")
def test_numbers_of_32_bits() -> None:
    mantissas = torch.tensor([0, 1, 1 << 22, (1 << 22) - 1, (1 << 23) - 1])
    bits = (torch.arange(-256, 256).view(-1, 1) << 23) + mantissas
    assert sum(check(of_bits(bits, torch.float32))) == 2 * len(mantissas)


@pytest.mark.parametrize("dtype", [*TYPES, torch.float64])
@pytest.mark.usefixtures("compiled")
def test_what_is_odd_but_finite(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    values = [info.max, info.min, info.tiny, -info.tiny, info.smallest_normal * info.eps, -0.0, 0.0]
    odd = torch.tensor(values, dtype=dtype)
    assert odd.count_nonzero() == 5
    assert sum(check([odd, *odd.unbind(), odd.repeat(100)])) == 0


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.usefixtures("compiled")
def test_every_place_from_every_start(dtype: torch.dtype) -> None:
    """What lies before and after a tensor is not its own."""
    longest = 80 if dtype == torch.float32 else 150  # some vectors of 64 bytes and a tail
    tensors = []
    for start in range(17):
        for numel in (0, 1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, longest):
            around = torch.full((start + numel + 1,), math.inf, dtype=dtype)
            around[start : start + numel] = -1.5
            tensors.append(around[start : start + numel])
    assert sum(check(tensors)) == 0
    tensors = []
    for number in range(longest):
        tensors += [torch.ones(numel, dtype=dtype) for numel in (number + 1, longest)]
        for tensor in tensors[-2:]:
            tensor[number] = BAD[number % len(BAD)]
    assert sum(check([*tensors, torch.ones(longest, dtype=dtype)])) == len(tensors)


@needs_c
@pytest.mark.parametrize("dtype", TYPES)
def test_a_place_that_is_no_multiple_of_the_size(dtype: torch.dtype) -> None:
    for start in range(1, 4):
        memory = bytearray(start + 100 * dtype.itemsize)
        tensors = [torch.frombuffer(memory, dtype=dtype, offset=start)]
        assert search(tensors)[1] == ()
        assert check(tensors) == [0]
        tensors[0][-1] = math.nan
        assert check(tensors) == [1]


def large(numel: int, bad: Sequence[int], dtype: torch.dtype) -> Tensor:
    tensor = torch.zeros(numel, dtype=dtype)
    tensor[list(bad)] = math.nan
    return tensor


@needs_c
@pytest.mark.parametrize("own", [False, True], ids=["threads of PyTorch", "of its own"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_large_ones_are_shared_between_threads(number: int, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if own:
        monkeypatch.setattr(searching, "parallel", lambda process: None)
    numel = 5 * PART + 3
    ends = [0, PART - 1, PART, 4 * PART, 5 * PART - 1, 5 * PART, numel - 1]
    for dtype in TYPES:
        tensors = [large(numel, [end], dtype) for end in ends]
        tensors += [large(numel, [], dtype), torch.empty(0, dtype=dtype), large(PART, [], dtype)]
        tensors += [large(PART, [PART - 1], dtype), large(numel, ends, dtype), torch.ones(3, 5, dtype=dtype)]
        with threads(number):
            assert check(tensors) == [1] * len(ends) + [0, 0, 0, 1, 1, 0]


def kinds(dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of one type by how they lie; one that is not the library's has a name in capitals."""
    whole = torch.zeros(4, 6, 2, 3, dtype=dtype)
    return {
        "whole": whole.clone(),
        "scalar": torch.zeros((), dtype=dtype),
        "empty": torch.zeros(3, 0, 2, dtype=dtype),
        "turned": torch.zeros(5, 7, dtype=dtype).t(),
        "channels last": whole.clone(memory_format=torch.channels_last),
        "permuted": whole.clone().permute(2, 0, 3, 1),
        "of ones": torch.zeros(1, 5, 1, dtype=dtype).transpose(0, 2),
        "COLUMNS": torch.zeros(5, 7, dtype=dtype)[:, :3],
        "EVERY SECOND": torch.zeros(9, dtype=dtype)[::2],
        "EXPANDED": torch.zeros(4, 1, dtype=dtype).expand(4, 3),
        "OVERLAPPING": torch.zeros(8, dtype=dtype).as_strided((2, 2, 2), (3, 3, 1)),
        "OVERLAPPING ROWS": torch.zeros(9, dtype=dtype).as_strided((3, 3), (1, 1)),
    }


@needs_c
def test_what_is_left_to_pytorch() -> None:
    tensors = {f"{name} {dtype}": tensor for dtype in TYPES for name, tensor in kinds(dtype).items()}
    tensors |= {f"{name.upper()} FLOAT64": tensor for name, tensor in kinds(torch.float64).items()}
    tensors["SPARSE"] = torch.zeros(3, 3).to_sparse()
    tensors["OF OTHERS"] = TwoTensor(torch.zeros(2), torch.zeros(2))
    tensors["ELSEWHERE"] = torch.zeros(2, device="meta")
    flags, left = search(list(tensors.values()))
    assert flags.tolist() == [0] * len(tensors)
    assert [name for k, name in enumerate(tensors) if k in left] == [name for name in tensors if name[:2].isupper()]


@pytest.mark.usefixtures("compiled")
def test_all_kinds_beside_one_another() -> None:
    """And what lies between the elements of a tensor is not its own."""
    tensors = [tensor for dtype in (*TYPES, torch.float64) for tensor in kinds(dtype).values()]
    assert sum(check(tensors)) == 0
    for k, tensor in enumerate(tensors):
        if tensor.numel():
            tensor[(-1,) * tensor.dim()] = BAD[k % len(BAD)]
    assert sum(check(tensors)) == len(tensors) - 4
    between = torch.tensor([0.0, math.nan, 0.0, math.nan])
    assert check([between[::2], between.view(2, 2)[:, 0], between[1::2], between]) == [0, 0, 1, 1]


@pytest.mark.usefixtures("compiled")
def test_nothing_at_all() -> None:
    assert check([]) == []
    assert check([torch.empty(0)]) == [0]
