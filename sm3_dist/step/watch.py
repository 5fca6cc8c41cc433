"""What a plan refers to by address, looked at in each step: anybody may replace, move or reinterpret it in between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from operator import is_, ne
from typing import Any

from torch import Tensor

from sm3_dist.layout.kinds import is_dtensor
from sm3_dist.step.state import State


class Watch:
    """Weights and states as a plan found them.

    Views and kernels hold on to the storage of state tensors. ``share_memory_()``, a queue to another process and
    ``.data =`` give a tensor another one; ``state[param][key] = …`` puts another tensor there; and ``model.to(…)``
    changes strides and types of weights.

    Args:
        states: the state of each parameter of the plan.
        released: tensors whose storage comes and goes between steps.
    """

    def __init__(self, states: Mapping[Tensor, State], released: Iterable[Tensor] = ()) -> None:
        self._params: list[Any] = list(states)
        self._states = list(states.values())
        self._values = self._now()
        self._counts = list(map(len, self._states))
        left_out = set(map(id, released))
        tensors = [v for v in self._values if isinstance(v, Tensor) and id(v) not in left_out]
        self._plain = [tensor for tensor in tensors if not is_dtensor(tensor)]
        self._sharded: list[Any] = [tensor for tensor in tensors if is_dtensor(tensor)]
        self._are_sharded = list(map(is_dtensor, self._params))
        self._addresses = self._where()
        self._layouts = self._strides()
        self._types = [param.dtype for param in self._params]  # of these the plan's signature tells

    def sees_a_change(self) -> bool:
        """Whether anything is not as it was."""
        now = self._now()
        if len(now) != len(self._values) or not all(map(is_, now, self._values)):
            return True
        return self._where() != self._addresses or self._strides() != self._layouts

    @property
    def changed(self) -> set[Tensor]:
        """The parameters that have other tensors in their state, other strides, or another type."""
        before = iter(self._values)
        kept = [[next(before) for _ in range(count)] for count in self._counts]
        laid_out = map(ne, self._strides(), self._layouts)
        rows = zip(self._params, self._states, kept, laid_out, self._types, strict=True)
        return {
            param
            for param, state, old, anew, dtype in rows
            if anew or dtype != param.dtype or len(state) != len(old) or not all(map(is_, state.values(), old))
        }

    def _now(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self._states))]

    def _where(self) -> list[int]:
        addresses = list(map(Tensor.data_ptr, self._plain))
        return addresses + [tensor._local_tensor.data_ptr() for tensor in self._sharded]

    def _strides(self) -> list[tuple[int, ...]]:
        if not any(self._are_sharded):
            return list(map(Tensor.stride, self._params))
        pairs = zip(self._params, self._are_sharded, strict=True)
        return [(param._local_tensor if sharded else param).stride() for param, sharded in pairs]
