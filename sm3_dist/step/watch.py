"""What a plan refers to by address, looked at in each step: anybody may replace, move or reinterpret it in between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from operator import attrgetter, is_
from typing import Any

from torch import Tensor

from sm3_dist.compiled.look import Held, Look
from sm3_dist.layout.kinds import dtensors, is_dtensor
from sm3_dist.step.state import State

_SHAPE = attrgetter("shape")


class Watch:
    """Weights and states as a plan found them.

    Views and kernels hold on to the storage of state tensors. ``share_memory_()``, a queue to another process and
    ``.data =`` give a tensor another one; ``state[param][key] = …`` puts another tensor there; ``t_()`` changes the
    strides of a state tensor, and ``model.to(…)`` strides, types and devices of weights.

    Args:
        states: the state of each parameter of the plan.
        released: tensors whose storage comes and goes between steps.
    """

    def __init__(self, states: Mapping[Tensor, State], released: Iterable[Tensor] = ()) -> None:
        self._params: list[Tensor] = list(states)
        self._states = list(states.values())
        self._counts, self._held = list(map(len, self._states)), Held(self._states)
        self._values = self._held.values
        self._forms = [*map(_form, self._params)], [*map(_form, self._values)]
        left_out = set(map(id, released))
        self._kept = [v for v in self._values if isinstance(v, Tensor) and id(v) not in left_out]
        self._sharded = dtensors([*self._params, *self._kept])
        self._shapes = list(map(_SHAPE, self._sharded))
        self._weights, self._look = (Look(list(map(_plain, these))) for these in (self._params, self._kept))
        self._addresses = self._look.addresses()

    def sees_a_change(self) -> bool:
        """Whether anything is not as it was."""
        if not self._held.is_unchanged():
            return True
        if self._sharded:  # whose local tensors may be others
            for look, tensors in ((self._weights, self._params), (self._look, self._kept)):
                look.turn_to(list(map(_plain, tensors)))
            if list(map(_SHAPE, self._sharded)) != self._shapes:
                return True
        return self._look.addresses() != self._addresses or not self._weights.is_unchanged()

    @property
    def changed(self) -> set[Tensor]:
        """The parameters of other type, device, shape or strides, or with other tensors in their state, or such."""
        old_values, (of_params, of_values) = iter(self._values), self._forms
        old_forms = iter(of_values)
        found = set()
        for param, state, form, count in zip(self._params, self._states, of_params, self._counts, strict=True):
            values, forms = list(islice(old_values, count)), list(islice(old_forms, count))
            now = list(state.values())
            same = len(now) == count and all(map(is_, now, values)) and list(map(_form, now)) == forms
            if not same or _form(param) != form:
                found.add(param)
        return found


def _plain(tensor: Any) -> Tensor:
    """What a rank holds of a tensor, without anything that autograd or a stream would have to know of."""
    local: Tensor = tensor._local_tensor if is_dtensor(tensor) else tensor
    return local


def _form(value: Any) -> tuple[Any, ...] | None:
    if not isinstance(value, Tensor):
        return None
    local = _plain(value)
    return value.shape, local.dtype, local.device, local.shape, local.stride()
