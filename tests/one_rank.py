"""Random training runs in which one rank does something else than the others, and what became of each rank.

    python tests/one_rank.py --cases 1000 --seed 0

A run without a fault must end with the bits of one process. A run with one must end so too, or with an error on every
rank that says what differs; never later than half a minute, never without a word and with other bits.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from harness import Call, Outcome, Pool
from layouts import LAYOUTS, SHAPES, Tensors, give, sharded_like
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sm3_dist import SM3, CollectiveError, GradientMismatchError, PlanMismatchError
from sm3_dist.ranks import spot_check, watch
from sm3_dist.step import keeper
from sm3_dist.step.param_groups import adamw_like_options

OURS = (PlanMismatchError, CollectiveError, GradientMismatchError)
WORLDS = {name: layout.worlds for name, layout in LAYOUTS.items() if name not in ("whole", "ddp")}
WORLDS |= {"zero1": (2, 3, 4), "fsdp1": (2, 3, 4)}
LIMIT = 30.0
AFTER = 8
"""Steps that follow a fault."""

SAID = {
    # fault: what the error on every rank must speak of
    "lr": r"\blr of param group|differ in lr=",
    "weight_decay": "weight_decay of param group|differ in weight_decay=",
    "beta": r"\bbeta of param group|differ in beta=",
    "eps": r"\beps of param group|differ in eps=",
    "other lr from the start": "differ in lr=",
    "frozen": "requires_grad|no more parameters|gradient",
    "frozen, and its gradient gone": "requires_grad|no more parameters|gradient",
    "one more param group": "no more parameters",
    "one parameter fewer from the start": "no more parameters|cut at|parts of|holds no",
    "other shape from the start": "shape",
    "other type from the start": "bfloat16|cut at",
    "no gradient": "gradient",
    "closure": "InjectedError|left out, or raised",
    "closure, and on": "InjectedError|left out, or raised",
    "step left out": "left out",
    "exit": "ended|stopped|closed",
    "own state loaded": "",
    "state replaced": "",
    "state read": "",
}


class InjectedError(Exception):
    """Raised in a closure."""


@dataclass(frozen=True)
class Case:
    """One run, which follows from its seed."""

    seed: int
    layout: str
    world: int
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any]
    fault: str
    victim: int
    at: int

    @classmethod
    def of(cls, seed: int, fault: str | None = None, layout: str | None = None) -> Case:
        """The case of a seed; with a fault or a layout in place of that which the seed gives."""
        chance = random.Random(seed)
        drawn = chance.choice(sorted(WORLDS))
        layout = layout or drawn
        world = chance.choice([world for world in WORLDS[layout] if world > 1])
        allowed = SHAPES if layout in ("zero1", "fsdp1") else LAYOUTS[layout].shapes
        shapes = tuple(chance.choice(allowed) for _ in range(chance.randint(2, 5)))
        options = recipe(chance) if chance.random() < 0.6 else paper(chance)
        if (guard := random.Random(-seed)).random() < 0.2:
            options["skip_nonfinite"] = guard.choice(["parameter", "step"])
        faults = [each for each in SAID if not ("tp" in layout and "from the start" in each)]  # PyTorch itself fails
        if layout not in (
            "hsdp",
            "hsdp-replicas-only",
            "zero1",
        ):  # a part without a gradient is no fault of sharded ones
            faults.remove("no gradient")
        drawn = chance.choice(["none", *faults]) if chance.random() < 0.8 else "none"
        fault, victim = fault or drawn, chance.randrange(world)
        # Before ranks have agreed on a first plan, they wait for one that ended as long as the process group lets them.
        first = 1 if fault == "exit" else 0
        return cls(seed, layout, world, shapes, options, fault, victim, chance.randint(first, 3))

    def __str__(self) -> str:
        where = f"{self.fault!r} on rank {self.victim} in step {self.at}" if self.fault != "none" else "no fault"
        return f"seed {self.seed}: {self.layout} on {self.world} ranks, {where}, {list(self.shapes)}, {self.options}"


def recipe(chance: random.Random) -> dict[str, Any]:
    options = adamw_like_options({"cover_block": chance.choice([2, 3, 64]), "weight_decay": chance.choice([0, 0.1])})
    if chance.random() < 0.3:
        options["momentum_dtype"] = chance.choice([torch.bfloat16, torch.int8])
    return options


def paper(chance: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {"momentum": chance.choice([0.0, 0.9]), "beta": chance.choice([0.0, 0.95])}
    if chance.random() < 0.3:
        options["shard_covers"] = True
    if chance.random() < 0.3:
        options["update_rms"] = 0.2
    return options


class Run:
    """The model of a case on one rank, and the same in one process."""

    def __init__(self, case: Case, differs: str) -> None:
        self.case = case
        shapes = list(case.shapes)
        if differs == "other shape from the start":
            shapes[-1] = (*shapes[-1][:-1], shapes[-1][-1] + 4)
        if differs == "one parameter fewer from the start":
            shapes = shapes[:-1]
        dtype = torch.bfloat16 if differs == "other type from the start" else torch.float32
        self.whole = list(Tensors(case.shapes).parameters())
        module, options = Tensors(shapes, dtype), dict(case.options)
        self.model: nn.Module = module
        if case.layout == "zero1":
            options["shard_over"] = dist.group.WORLD
        elif case.layout == "fsdp1":
            self.model = flattened(module)
            options["model"] = self.model
        else:
            self.model = LAYOUTS[case.layout].wrap(module)
        self.params = list(self.model.parameters())
        lr = 0.05 if differs == "other lr from the start" else 0.1
        self.optimizer = SM3(self.model.named_parameters(), lr=lr, **options)
        alone = {k: v for k, v in case.options.items() if k != "shard_covers"}
        self.alone = SM3(self.whole, lr=0.1, **alone)

    def give(self, step: int) -> None:
        """The gradients of a step; now and then there is none."""
        chance = torch.Generator().manual_seed(self.case.seed * 100 + step)
        grads = [torch.randn(weight.shape, generator=chance) for weight in self.whole]
        missing = torch.rand(len(grads), generator=chance) < 0.15
        if self.case.layout == "fsdp1":
            missing.fill_(False)
            self.params[0].grad = self.part(grads).to(self.params[0].dtype)
        for k, (weight, grad) in enumerate(zip(self.whole, grads, strict=True)):
            weight.grad = None if missing[k] else grad.clone()
            if self.case.layout != "fsdp1" and k < len(self.params) and self.params[k].shape == weight.shape:
                frozen = not self.params[k].requires_grad
                give(self.params[k], None if missing[k] or frozen else grad.to(self.params[k].dtype))

    def part(self, tensors: Sequence[Tensor]) -> Tensor:
        """This rank's part of tensors that lie one after another in a flat one."""
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        size = self.params[0].numel()
        padded = torch.cat([flat, flat.new_zeros(size * dist.get_world_size())])
        return padded[dist.get_rank() * size :][:size].clone()

    def equal(self) -> bool:
        """Whether the weights are those of one process."""
        if self.case.layout == "fsdp1":
            padded = max(0, (dist.get_rank() + 1) * self.params[0].numel() - sum(w.numel() for w in self.whole))
            numel = self.params[0].numel() - padded
            return torch.equal(self.params[0].detach()[:numel], self.part(self.whole)[:numel])
        return len(self.params) == len(self.whole) and all(
            alike(param, weight.detach()) for param, weight in zip(self.params, self.whole, strict=True)
        )


def flattened(module: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(module, device_id=torch.device("cpu"))


def run(seed: int, fault: str | None, layout: str | None) -> tuple[bool, str]:
    """One rank of a case: whether its weights are right at the end, and what it is called."""
    case = Case.of(seed, fault, layout)
    mine = case.fault if dist.get_rank() == case.victim else "none"
    watch.RankWatch._last_error = 0.0  # that of the case before
    with (
        patch.multiple(watch, LOOK_EVERY=watch.LOOK_EVERY / 5),
        patch.object(spot_check, "SECONDS", 0.1),
        patch.object(spot_check, "PATIENCE", spot_check.PATIENCE / 2),
        patch.object(keeper, "PATIENCE", keeper.PATIENCE / 10),
        patch.object(watch, "PATIENCE", watch.PATIENCE / 10),
    ):
        train = Run(case, mine)
        for step in range(case.at + AFTER):
            train.optimizer.zero_grad()
            train.give(step)
            train.alone.step()
            closure = None
            if step == case.at and mine not in ("none", "step left out"):
                closure = misbehave(mine, train)
            if mine == "step left out" and step >= case.at and any(param.grad is not None for param in train.params):
                mine = "none"  # a step without any gradient would leave no trace, see docs/one-rank.md
                continue
            try:
                train.optimizer.step(closure)
            except InjectedError:
                if mine == "closure":
                    raise
            time.sleep(0.02)
        train.optimizer.state  # noqa: B018  # waits for what is on its way
    return train.equal(), str(case)


def misbehave(fault: str, train: Run) -> Callable[[], Any] | None:
    """What the odd rank does in one step. Returns its closure, if it has one."""
    optimizer, group = train.optimizer, train.optimizer.param_groups[0]
    if fault in ("lr", "weight_decay", "beta", "eps"):
        group[fault] = {"lr": 0.05, "weight_decay": 0.3, "beta": 0.5, "eps": 1e-3}[fault]
    elif fault in ("frozen", "frozen, and its gradient gone"):
        train.params[0].requires_grad_(False)
        if "gone" in fault:
            train.params[0].grad = None
    elif fault == "one more param group":
        optimizer.add_param_group({"params": [("added", nn.Parameter(torch.zeros_like(train.params[-1].detach())))]})
    elif fault == "no gradient":
        for param in train.params:
            param.grad = None
    elif fault.startswith("closure"):
        return raising
    elif fault == "exit":
        os._exit(9)
    elif fault == "own state loaded":
        optimizer.load_state_dict(optimizer.state_dict())
    elif fault == "state replaced":
        for param in train.params:
            if param in optimizer.state:
                optimizer.state[param] = {k: v.clone() for k, v in optimizer.state[param].items()}
    elif fault == "state read":
        optimizer.state_dict()
    return None


def alike(param: Tensor, whole: Tensor) -> bool:
    """Whether this rank has its part, to the bit. (Of no elements, PyTorch has more than one shape.)"""
    if not isinstance(param, DTensor):
        return torch.equal(param.detach(), whole)
    here, there = param.to_local(), sharded_like(param, whole).to_local()
    return torch.equal(here.detach().reshape(-1), there.reshape(-1))


def raising() -> float:
    raise InjectedError("the data of this rank ran out")


Verdict = str


def judge(case: Case, outcomes: dict[int, Outcome]) -> tuple[Verdict, str]:
    """``right``, ``told``, or what was wrong: ``hang``, ``drift``, ``unclear`` or ``wrong``."""
    errors = {rank: outcome.error for rank, outcome in outcomes.items()}
    others = {rank: error for rank, error in errors.items() if rank != case.victim or case.fault == "none"}
    if any(isinstance(error, TimeoutError) for error in errors.values()):
        return "hang", words_of(errors)
    dead = [rank for rank, error in errors.items() if isinstance(error, ProcessLookupError)]
    if any(rank != case.victim or case.fault != "exit" for rank in dead):
        return "unclear", words_of(errors)  # a process died of it
    values = [outcome.value for outcome in outcomes.values() if outcome.error is None]
    finished = {rank for rank, error in errors.items() if error is None}
    through = len(values) == case.world or case.fault == "exit"
    if through and all(value[0] for value in values) and not any(errors[rank] for rank in others):
        return "right", ""
    if case.fault == "none":
        return "wrong", words_of(errors)
    if finished:
        return "drift", f"ranks {sorted(finished)} ended without an error; {words_of(errors)}"
    for rank, error in errors.items():
        if rank == case.victim and (isinstance(error, InjectedError) or case.fault == "exit"):
            continue
        said = re.search(SAID[case.fault], str(error)) and "rank" in str(error)
        if not isinstance(error, GradientMismatchError) and not (isinstance(error, OURS) and said):
            return "unclear", words_of(errors)
    return "told", words_of(errors)


def words_of(errors: dict[int, BaseException | None]) -> str:
    return "\n".join(f"    rank {rank}: {type(error).__name__}: {str(error)[:500]}" for rank, error in errors.items())


def try_case(pool: Pool, seed: int, fault: str | None = None, layout: str | None = None) -> tuple[Case, Verdict, str]:
    """Run the case of a seed. One that takes too long is run again: the machine may have been busy."""
    case = Case.of(seed, fault, layout)
    for _ in range(2):
        verdict, words = judge(case, pool.execute(case.world, Call(run, (seed, fault, layout), {}), LIMIT, LIMIT))
        if verdict != "hang":
            break
    if case.fault == "exit":
        pool.kill()
    return case, verdict, words


def main() -> int:
    parser = argparse.ArgumentParser(description="Random runs in which one rank does something else.")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others have those that follow")
    parser.add_argument("--fault", help="this one alone", choices=["none", *SAID])
    parser.add_argument("--layout", help="this one alone", choices=sorted(WORLDS))
    given = parser.parse_args()
    counts: Counter[Verdict] = Counter()
    started = time.monotonic()
    with Pool() as pool:
        for seed in range(given.seed, given.seed + given.cases):
            case, verdict, words = try_case(pool, seed, given.fault, given.layout)
            counts[verdict] += 1
            if verdict not in ("right", "told"):
                print(f"{verdict}: {case}\n{words}", flush=True)
    print(f"{given.cases} cases in {time.monotonic() - started:.0f} s: {dict(counts)}")
    return 1 if set(counts) - {"right", "told"} else 0


if __name__ == "__main__":
    sys.exit(main())
