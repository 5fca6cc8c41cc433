"""Learning-rate schedules for ``torch.optim.lr_scheduler.LambdaLR``.

SM3's own accumulators already shrink the steps as training goes on, so its authors ask for little: a quadratic warm-up,
a constant rate, and a short cool-down to zero. :class:`PaperSchedule` is that recipe. :class:`CosineSchedule` is the
usual alternative, for runs whose accumulators are moving averages (``beta > 0``) and shrink nothing.

A schedule maps the number of steps already taken, ``t = 0, 1, …``, to the factor by which ``LambdaLR`` multiplies the
learning rate of the step to come. Schedules are plain values: they compare, pickle, and travel in
``LambdaLR.state_dict()``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["CosineSchedule", "PaperSchedule"]


@dataclass(frozen=True)
class PaperSchedule:
    """The SM3 authors' recipe: quadratic warm-up, constant, linear cool-down to zero.

    With ``T`` steps in all, of which ``W`` warm up and ``D`` cool down::

        factor(t) = min(1, ((t + 1) / W)^2, (T - t) / D)

    The first step has ``1 / W^2`` of the learning rate (not 0, which would waste it), the last ``1 / D``; from
    ``t = T`` on the factor is 0.

    Args:
        total_steps: ``T``, the number of optimizer steps in the whole run, at least 1.
        warmup: share of the steps that warm up, 0 to 1; ``W = round(warmup * T)``. The authors use 5 %.
        cooldown: share of the steps that cool down, 0 to 1; ``D = round(cooldown * T)``. The authors use 10 %. With 0
            the rate stays constant, past the end too.

    Raises:
        TypeError: ``total_steps`` is not an integer.
        ValueError: an argument is out of range, or warm-up and cool-down together are longer than the run.

    Example:
        >>> import torch
        >>> from sm3_dist.schedule import PaperSchedule
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, PaperSchedule(40, warmup=0.1, cooldown=0.1))
        >>> rates = []
        >>> for _ in range(40):
        ...     rates += scheduler.get_last_lr()
        ...     optimizer.step()
        ...     scheduler.step()
        >>> [round(rate, 6) for rate in rates[:5]]  # four steps of warm-up
        [0.00625, 0.025, 0.05625, 0.1, 0.1]
        >>> [round(rate, 6) for rate in rates[-5:]]  # four steps of cool-down
        [0.1, 0.1, 0.075, 0.05, 0.025]

    Source: R. Anil, V. Gupta, T. Koren, Y. Singer, "Memory-Efficient Adaptive Optimization", arXiv 1901.11150; the
    shares are those that the authors recommend beside their code (google-research/google-research, ``sm3/README.md``).
    """

    total_steps: int
    warmup: float = 0.05
    cooldown: float = 0.1

    def __post_init__(self) -> None:
        _check_steps(self.total_steps)
        _check_share("warmup", self.warmup)
        _check_share("cooldown", self.cooldown)
        if self.warmup + self.cooldown > 1:
            raise ValueError(
                f"warmup={self.warmup} and cooldown={self.cooldown} are shares of the same {self.total_steps} steps "
                "and add up to more than 1; make one of them smaller"
            )

    def __call__(self, t: int) -> float:
        """Return the factor for the step that follows ``t`` taken ones."""
        cooling = round(self.cooldown * self.total_steps)
        left = max(0, self.total_steps - t)
        return min(_warmup(t, self.warmup * self.total_steps), left / cooling if cooling else 1.0)


@dataclass(frozen=True)
class CosineSchedule:
    """Quadratic warm-up, then half a cosine from 1 down to ``floor``.

    With ``T`` steps in all, of which ``W`` warm up::

        factor(t) = ((t + 1) / W)^2                                                    t < W
        factor(t) = floor + (1 - floor) * (1 + cos(pi * (t - W) / (T - W))) / 2        W <= t < T
        factor(t) = floor                                                              t >= T

    Args:
        total_steps: ``T``, the number of optimizer steps in the whole run, at least 1.
        warmup: share of the steps that warm up, 0 to 1; ``W = round(warmup * T)``.
        floor: the factor at the end, 0 to 1.

    Raises:
        TypeError: ``total_steps`` is not an integer.
        ValueError: an argument is out of range.

    Example:
        >>> from sm3_dist.schedule import CosineSchedule
        >>> factor = CosineSchedule(total_steps=100, warmup=0.2, floor=0.1)
        >>> [round(factor(t), 4) for t in (0, 9, 19, 20, 60, 100)]
        [0.0025, 0.25, 1.0, 1.0, 0.55, 0.1]

    Source: I. Loshchilov, F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", arXiv 1608.03983, without
    the restarts; the warm-up is that of :class:`PaperSchedule`.
    """

    total_steps: int
    warmup: float = 0.05
    floor: float = 0.0

    def __post_init__(self) -> None:
        _check_steps(self.total_steps)
        _check_share("warmup", self.warmup)
        _check_share("floor", self.floor)

    def __call__(self, t: int) -> float:
        """Return the factor for the step that follows ``t`` taken ones."""
        start = round(self.warmup * self.total_steps)
        if t < start:
            return _warmup(t, start)
        if t >= self.total_steps:
            return self.floor
        phase = (t - start) / (self.total_steps - start)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * phase)) / 2


def _warmup(t: int, steps: float) -> float:
    """``((t + 1) / W)^2`` up to 1, where ``W`` is ``steps`` rounded."""
    return min(1.0, ((t + 1) / max(1, round(steps))) ** 2)


def _check_steps(total_steps: object) -> None:
    if isinstance(total_steps, bool) or not isinstance(total_steps, int):
        raise TypeError(f"total_steps={total_steps!r} must be an integer, the number of optimizer steps in the run")
    if total_steps < 1:
        raise ValueError(f"total_steps={total_steps} must be at least 1")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:  # also refuses NaN
        raise ValueError(f"{name}={value} must lie between 0 and 1")
