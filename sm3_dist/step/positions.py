"""Positions: where parameters stand in the param groups, by which it is told who was exchanged for whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from sm3_dist.step.param_groups import ParamGroup


class Positions:
    """Where parameters stood when they were last looked at.

    Some frameworks, accelerate among them, wrap a model after its optimizer was made, and put the new parameters in the
    places of the old ones. Others remove groups, or parameters, and add new ones: those are exchanged for nobody.
    """

    def __init__(self) -> None:
        self._before: list[tuple[ParamGroup, list[Tensor]]] = []

    def remember(self, groups: Sequence[ParamGroup]) -> None:
        """Note where parameters stand now."""
        self._before = [(group, list(group["params"])) for group in groups]

    def expect(self, group: ParamGroup) -> None:
        """Note a new group, whose parameters take nobody's place."""
        self._before.append((group, []))

    def exchanged(self, groups: Sequence[ParamGroup]) -> Iterator[tuple[Tensor, int, int]]:
        """The parameters that have left, each with the group and the place there in which another one stands now.

        A group is the one that it was wherever it stands. (If all of them are others, somebody has copied them.) Where
        it has become longer or shorter and some parameters have stayed, the others were not exchanged.
        """
        there = {param for group in groups for param in group["params"]}
        known = {id(group): params for group, params in self._before}
        copied = known.keys().isdisjoint(map(id, groups))
        for g, group in enumerate(groups):
            before = self._before[g][1] if copied and g < len(self._before) else known.get(id(group), [])
            if len(before) != len(group["params"]) and not there.isdisjoint(before):
                continue
            for index, (old, new) in enumerate(zip(before, group["params"], strict=False)):
                if old is not new and old not in there:
                    yield old, g, index
