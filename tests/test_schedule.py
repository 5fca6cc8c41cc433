"""The learning-rate schedules: their formulas, their edges, and life inside LambdaLR."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from sm3_dist.schedule import CosineSchedule, PaperSchedule

SCHEDULES = [PaperSchedule(200), CosineSchedule(200, floor=0.1)]


def test_paper_schedule_has_the_shape_of_the_recipe() -> None:
    factor = PaperSchedule(200)  # 10 steps of warm-up, 20 of cool-down
    assert [factor(t) for t in range(10)] == [((t + 1) / 10) ** 2 for t in range(10)]
    assert all(factor(t) == 1.0 for t in range(9, 181))
    assert [factor(t) for t in range(180, 200)] == [(200 - t) / 20 for t in range(180, 200)]
    assert factor(200) == factor(1000) == 0.0


def test_cosine_schedule_meets_its_warmup_and_its_floor() -> None:
    factor = CosineSchedule(200, warmup=0.1, floor=0.25)
    assert factor(19) == factor(20) == 1.0
    assert factor(110) == pytest.approx(0.625)
    assert factor(200) == factor(1000) == 0.25
    after = [factor(t) for t in range(20, 201)]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 19])
@pytest.mark.parametrize("kind", [PaperSchedule, CosineSchedule])
def test_every_step_of_a_short_run_moves_the_weights(kind: Callable[[int], Callable[[int], float]], total: int) -> None:
    assert all(0 < kind(total)(t) <= 1 for t in range(total))


def test_without_warmup_and_cooldown_the_rate_is_constant() -> None:
    factor = PaperSchedule(50, warmup=0.0, cooldown=0.0)
    assert {factor(t) for t in range(80)} == {1.0}


@pytest.mark.parametrize("whole", [PaperSchedule(20, warmup=1.0, cooldown=0.0), CosineSchedule(20, warmup=1.0)])
def test_a_run_that_only_warms_up(whole: Callable[[int], float]) -> None:
    assert whole(0) == (1 / 20) ** 2
    assert whole(19) == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_survive_pickle_and_copy(schedule: PaperSchedule | CosineSchedule) -> None:
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert copy.deepcopy(schedule) == schedule


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lambda_lr_resumes_where_it_stopped(schedule: PaperSchedule | CosineSchedule) -> None:
    def scheduler(factor: Callable[[int], float]) -> LambdaLR:
        return LambdaLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5), factor)

    def advance(run: LambdaLR, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            rates.append(float(run.get_last_lr()[0]))
            run.optimizer.step()
            run.step()
        return rates

    whole = advance(scheduler(schedule), 200)
    assert whole == [0.5 * schedule(t) for t in range(200)]

    first = scheduler(schedule)
    begun = advance(first, 120)
    second = scheduler(type(schedule)(7))  # the state carries the schedule: total_steps=7 is replaced
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert begun + advance(second, 80) == whole


@pytest.mark.parametrize("kind", [PaperSchedule, CosineSchedule])
@pytest.mark.parametrize("total", [10.0, "10", None, True])
def test_steps_must_be_an_integer(kind: Callable[[object], object], total: object) -> None:
    with pytest.raises(TypeError, match="total_steps"):
        kind(total)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: PaperSchedule(0), "total_steps=0"),
        (lambda: CosineSchedule(-5), "total_steps=-5"),
        (lambda: PaperSchedule(10, warmup=-0.1), "warmup=-0.1"),
        (lambda: PaperSchedule(10, cooldown=1.5), "cooldown=1.5"),
        (lambda: PaperSchedule(10, warmup=float("nan")), "warmup=nan"),
        (lambda: PaperSchedule(10, warmup=0.6, cooldown=0.6), "more than 1"),
        (lambda: CosineSchedule(10, floor=2.0), "floor=2.0"),
    ],
)
def test_bad_shares_are_refused_with_their_value(make: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()
