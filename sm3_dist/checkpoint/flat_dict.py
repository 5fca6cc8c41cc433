"""State dicts that are flat, as ``StateDictOptions(flatten_optimizer_state_dict=True)`` asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def flatten(state: Mapping[str, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One flat dict, as ``StateDictOptions(flatten_optimizer_state_dict=True)`` asks for.

    Example:
        >>> flatten({"w": {"step": 3}}, [{"params": ["w"], "lr": 0.1}])
        {'state.w.step': 3, 'param_groups.w.lr': 0.1}
    """
    flat = {f"state.{name}.{key}": value for name, values in state.items() for key, value in values.items()}
    for group in groups:
        for name in group["params"]:
            flat |= {f"param_groups.{name}.{key}": value for key, value in group.items() if key != "params"}
    return flat


def unflatten(flat: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The inverse of :func:`flatten`, with a param group for each name."""
    state: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for path, value in flat.items():
        kind, _, rest = path.partition(".")
        name, _, key = rest.rpartition(".")
        if kind == "state":
            state.setdefault(name, {})[key] = value
        else:
            groups.setdefault(name, {"params": [name]})[key] = value
    return state, list(groups.values())
