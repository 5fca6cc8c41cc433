"""Look: where and how tensors lie in memory, asked of all of them at once.

Anybody may move, replace or reinterpret a tensor between two steps, so each is looked at in every step. Of thousands of
small tensors a loop in Python, be it within ``map``, takes as long as their step; the compiled library does it for all.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain, repeat
from operator import attrgetter, is_, is_not
from typing import Any

import torch
from torch import Tensor

from sm3_dist.compiled.library import NEXT_OF_DICT, functions_of_torch, integers, looks, place_of

_LAYOUT, _DTYPE, _DEVICE, _SHAPE = map(attrgetter, ("layout", "dtype", "device", "shape"))


class Look:
    """Looks at some tensors: their addresses, and whether type, device, shape and strides of each are those noted.

    Args:
        tensors: plain ones.
        compiled: whether to have the compiled library look, where it can.

    Example:
        >>> weight = torch.zeros(3, 4)
        >>> look = Look([weight])
        >>> look.addresses() == integers([weight.data_ptr()])
        True
        >>> _ = weight.t_()
        >>> look.addresses() is None
        True
    """

    def __init__(self, tensors: Sequence[Tensor], compiled: bool = True) -> None:
        self._library = looks() if compiled else None
        self._noted: Any = None
        self.turn_to(tensors)
        self.note()

    def turn_to(self, tensors: Sequence[Tensor]) -> None:
        """Look at these from now on, which should have the form of those before."""
        self._tensors = tensors  # lives as long as its address is of interest
        if self._library is not None:
            self._objects = integers(map(id, tensors))

    def note(self) -> None:
        """Take the form that the tensors have now for the one to have."""
        self._number = len(self._tensors)
        words = -1 if self._library is None else self._look(None, None, None)
        if words < 0:  # a form that the library does not know
            self._library, self._noted = None, forms_of(self._tensors)
        else:
            self._noted = integers([0]) * words
            self._look(None, self._noted, None)

    def addresses(self) -> array[int] | None:
        """Where the tensors lie; ``None`` if they do not have the form noted."""
        if self._library is None:
            return integers(map(Tensor.data_ptr, self._tensors)) if self.is_unchanged() else None
        places = integers([0]) * len(self._tensors)
        return places if self._is_noted(places) else None

    def is_unchanged(self) -> bool:
        """Whether the tensors have the form noted."""
        if self._library is None:
            return bool(forms_of(self._tensors) == self._noted)
        return self._is_noted(None)

    def _is_noted(self, places: array[int] | None) -> bool:
        return len(self._tensors) == self._number and self._look(places, None, self._noted) >= 0

    def _look(self, places: array[int] | None, forms: array[int] | None, noted: array[int] | None) -> int:
        assert self._library is not None
        asked, objects, *answers = map(place_of, (functions_of_torch(), self._objects, places, forms, noted))
        return int(self._library.sm3_look(asked, objects, len(self._objects), *answers))


class Held:
    """The keys and values that some dictionaries hold.

    Args:
        dicts: the dictionaries.
        compiled: whether to have the compiled library look, where it can.

    Example:
        >>> state = {"step": object()}
        >>> held = Held([state])
        >>> held.is_unchanged()
        True
        >>> state["step"] = object()
        >>> held.is_unchanged()
        False
    """

    def __init__(self, dicts: Sequence[dict[Any, Any]], compiled: bool = True) -> None:
        self._library = looks() if compiled else None
        self._dicts = dicts
        self._items = self._now()
        self._objects, self._of_dicts = integers(map(id, self._items)), integers(map(id, dicts))

    @property
    def values(self) -> list[Any]:
        """The values that they held."""
        return self._items[1::2]

    def is_unchanged(self) -> bool:
        """Whether they hold the same objects, in the same order."""
        if self._library is None:
            now = self._now()
            return len(now) == len(self._items) and all(map(is_, now, self._items))
        dicts, objects = ((place_of(each), len(each)) for each in (self._of_dicts, self._objects))
        return bool(self._library.sm3_hold(NEXT_OF_DICT, *dicts, *objects))

    def _now(self) -> list[Any]:
        items = chain.from_iterable(map(dict.items, self._dicts))
        return [*chain.from_iterable(items)]


def forms_of(tensors: Sequence[Tensor]) -> list[Any]:
    """Types, devices, shapes and strides of tensors."""
    layouts = list(map(_LAYOUT, tensors))
    if any(map(is_not, layouts, repeat(torch.strided))):
        return layouts  # those have no strides
    return [list(map(of, tensors)) for of in (_DTYPE, _DEVICE, _SHAPE, Tensor.stride)]
