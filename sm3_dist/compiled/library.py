"""The compiled library, where there is one, and the functions of PyTorch and of Python that it calls."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
from array import array
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sm3_dist.compiled.sources import FOLDER, is_current

_pointer, _integer = ctypes.c_void_p, ctypes.c_int64
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {  # what each returns, and what it takes
    "sm3_width": (ctypes.c_char_p, (ctypes.c_int,)),
    "sm3_scratch_bytes": (_integer, (_pointer, _integer, _integer)),
    "sm3_step": (
        None,
        (
            *(_pointer, _integer, _pointer, _pointer, _pointer, _integer, _pointer),
            *(_integer, _integer, _pointer, _pointer),
        ),
    ),
    "sm3_not_finite": (None, (_pointer, _integer, _pointer, _integer, _pointer)),
}
_LOOKS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "sm3_look": (_integer, (_pointer, _pointer, _integer, _pointer, _pointer, _pointer)),
    "sm3_runs": (_integer, (_pointer, _pointer, _integer, _pointer)),
    "sm3_hold": (_integer, (_pointer, _pointer, _integer, _pointer, _integer)),
    "sm3_average": (None, (_pointer, _pointer, _integer)),
}
_OF_TORCH = ("data_ptr", "layout", "dtype", "device_type", "device_index", "dim", "sizes", "strides")
"""What the functions in ``struct torch`` get; PyTorch calls each ``aoti_torch_get_…``."""
_NUMBERS = ("device_type_cpu", "dtype_float32", "dtype_bfloat16", "dtype_float16")
"""Whose numbers are in ``struct torch``; the functions that return them are ``aoti_torch_…``."""
MAX_THREADS = 256
"""Most that work at one time, as in ``threads.h``."""
_IMPORTED_BY = os.getpid()
COMPILE = "pip install --force-reinstall --no-deps --no-cache-dir --no-binary sm3_dist -v sm3_dist"
"""pip would take a wheel without the kernel otherwise: one for every platform, or the one that it made and kept."""
NEXT_OF_DICT = ctypes.cast(ctypes.pythonapi.PyDict_Next, _pointer)


@functools.cache
def library() -> ctypes.CDLL | str:
    """The library, or why it cannot be used."""
    built = [path for suffix in importlib.machinery.EXTENSION_SUFFIXES if (path := FOLDER / f"_cpu{suffix}").exists()]
    if not built:
        return (
            f"the C kernel was not compiled for this Python: none lies in {FOLDER}. Install a C compiler (gcc or "
            f"clang) and install sm3_dist again: {COMPILE}, or in a checkout pip install -v -e ., show what the "
            "compiler says."
        )
    try:
        found = ctypes.CDLL(str(built[0]))
    except OSError as error:
        return f"the compiled C kernel does not load: {error}. Install sm3_dist again on this machine."
    if not is_current(found):
        return (
            f"the C kernel {built[0]} was compiled from other sources than lie beside it. Install sm3_dist again: in a "
            "checkout pip install -e . compiles it."
        )
    _declare(found, _FUNCTIONS)
    return found


@functools.cache
def looks() -> ctypes.PyDLL | None:
    """What of the library looks at Python's objects, called with the interpreter's lock; ``None`` where it cannot."""
    found, functions = library(), functions_of_torch()
    if isinstance(found, str) or functions is None:
        return None
    locked = ctypes.PyDLL(found._name)
    _declare(locked, _LOOKS)
    return locked if _tells_the_truth(locked, functions) else None


def no_look() -> str | None:
    """Why nothing of the library looks at Python's objects; ``None`` if it does."""
    if looks() is not None:
        return None
    found = library()
    return found if isinstance(found, str) else f"PyTorch {torch.__version__} does not tell it where tensors lie."


@functools.cache
def functions_of_torch() -> array[int] | None:
    """``struct torch`` of ``look.h``; ``None`` where its contents cannot be had."""
    samples = [torch.empty(n, dtype=torch.float32, device="cpu") for n in range(3)]
    places = range(object.__basicsize__, Tensor.__basicsize__, ctypes.sizeof(_pointer))
    within = [place for place in places if all(_pointer.from_address(id(t) + place).value == t._cdata for t in samples)]
    try:
        found = ctypes.CDLL(torch._C.__file__)  # what it depends on is looked through too
        functions = [ctypes.cast(getattr(found, f"aoti_torch_get_{name}"), _pointer).value or 0 for name in _OF_TORCH]
        numbers = [getattr(found, f"aoti_torch_{name}")() for name in _NUMBERS]
    except (OSError, AttributeError):
        return None
    return integers([*within, *functions, *numbers]) if len(within) == 1 else None


@functools.cache
def parallel(process: int) -> int | None:
    """Address of the function that calls another on PyTorch's threads; ``None`` where it cannot be had.

    In a process that was forked the threads are missing, and waiting for them would never end.
    """
    if process != _IMPORTED_BY:
        return None
    try:
        found = ctypes.CDLL(torch._C.__file__)  # what it depends on is looked through too
        return ctypes.cast(found.GOMP_parallel, _pointer).value
    except (OSError, AttributeError):
        return None


def integers(values: Iterable[int]) -> array[int]:
    """Numbers, side by side as the library reads and writes them."""
    return array("q", values)


def place_of(numbers: array[int] | None) -> int | None:
    """Where they lie in memory."""
    return None if numbers is None else numbers.buffer_info()[0]


def _tells_the_truth(locked: ctypes.PyDLL, functions: array[int]) -> bool:
    """Whether PyTorch's functions are what they are taken for."""
    sample = torch.empty(2, 3, dtype=torch.float32, device="cpu").t()
    objects, places, form = integers([id(sample)]), integers([0]), integers([0] * 8)
    words = locked.sm3_look(place_of(functions), place_of(objects), 1, place_of(places), place_of(form), None)
    float32, cpu = (functions[_NUMBERS.index(name) - len(_NUMBERS)] for name in ("dtype_float32", "device_type_cpu"))
    is_known = places[0] == sample.data_ptr() and list(form[:2]) == [float32, cpu]
    return words == 8 and is_known and list(form[3:]) == [2, *sample.shape, *sample.stride()]


def _declare(found: ctypes.CDLL, functions: dict[str, tuple[Any, tuple[Any, ...]]]) -> None:
    for name, (returned, taken) in functions.items():
        function = getattr(found, name)
        function.restype, function.argtypes = returned, taken
