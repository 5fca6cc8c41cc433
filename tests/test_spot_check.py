"""Ranks that send one another nothing: what they find out of one another through the store in later steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from sm3_dist import PlanMismatchError
from sm3_dist.ranks import spot_check
from sm3_dist.ranks.difference import Facts
from sm3_dist.ranks.spot_check import SpotCheck


class Circle:
    """A rank of two, that takes steps with these learning rates."""

    ranks, token, names = (0, 1), "token", (["lr"], [])
    watch = SimpleNamespace(look=lambda: None)

    def __init__(self, rates: Sequence[float]) -> None:
        self._facts = iter([Facts(call, ((rate,),)) for call, rate in enumerate(rates, 1)])

    def facts(self) -> Facts:
        return next(self._facts)

    def place(self, name: str) -> str:
        return f"here/{name}"


def compared(monkeypatch: pytest.MonkeyPatch, first: Sequence[float], second: Sequence[float]) -> list[int]:
    """The first rank takes all of its steps, and then the other one: which steps that remembers."""
    store = dist.HashStore()
    monkeypatch.setattr(spot_check, "store_of_world", lambda: store)
    monkeypatch.setattr(spot_check, "FIRST", 0)
    monkeypatch.setattr(spot_check, "SECONDS", 0.0)
    monkeypatch.setattr(spot_check, "RANKS_PER_SECOND", math.inf)
    for rank, rates in enumerate((first, second)):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        check = SpotCheck(Circle(rates))  # type: ignore[arg-type]
        for _ in rates:
            check.look()
    return list(check._done)


ALIKE = [0.1, 0.1, 0.2, 0.2, 0.2, 0.3, 0.1, 0.1]


def test_what_is_alike_is_no_error_and_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spot_check, "KEPT", 5)
    assert compared(monkeypatch, ALIKE, ALIKE) == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("at", [0, 1, 3, 5, 7])
def test_a_step_that_differs_is_told(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    other = [*ALIKE[:at], 0.7, *ALIKE[at + 1 :]]
    with pytest.raises(PlanMismatchError, match=rf"lr of param group 0 is 0.7 on ranks \[1\], and {ALIKE[at]} on"):
        compared(monkeypatch, ALIKE, other)


def test_a_difference_of_long_ago_is_one_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spot_check, "SHOWN", 3)
    with pytest.raises(
        PlanMismatchError, match=r"ranks 0 and 1 of \[0, 1\] .* in a step before number 6, which is too"
    ):
        compared(monkeypatch, ALIKE, [0.7, *ALIKE[1:]])
