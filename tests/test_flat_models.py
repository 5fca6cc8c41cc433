"""Flattened parameters of models with peculiarities, and optimizers that hold some of them: still bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from flat_layouts import Model, clean, exact_gradient, fsdp1, gather_fsdp1, wrap_fsdp1
from harness import Pool
from torch import Tensor, nn

from sm3_dist import SM3


class Products(nn.Module):
    """The sum of the products of parameters of `inner` with the gradients that they are to get."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, grads: dict[str, Tensor]) -> Tensor:
        return torch.stack([(attrgetter(name)(self.inner) * grad).sum() for name, grad in grads.items()]).sum()


def compare(make: Callable[[], nn.Module], wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Train what `make` makes, wrapped and whole."""
    inner = make()
    whole = {name: weight for name, weight in inner.named_parameters() if weight.requires_grad}
    alone = SM3(whole.values(), lr=0.3, momentum=0.9, weight_decay=0.1)
    model = wrap(Products(make()))
    optimizer = SM3(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.1, model=model)
    for step in range(3):
        grads = {name: exact_gradient(step, name, weight.shape) for name, weight in whole.items()}
        model(grads).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, grad in grads.items():
            whole[name].grad = grad
        alone.step()
    expected = dict(inner.named_parameters())
    for name, weight in gather_fsdp1(model).items():
        assert torch.equal(weight, expected[name.removeprefix("inner.")]), name


class Tied(nn.Module):
    """An embedding and a head that are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(6)
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight


def channels_last() -> nn.Module:
    """A kernel whose dimensions lie in memory in the order 0, 2, 3, 1; the bias moves the cuts into its rows."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 5, 3).to(memory_format=torch.channels_last)
    assert not convolution.weight.is_contiguous()
    return convolution


def transposed() -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(5, 7)
    linear.weight = nn.Parameter(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).t())
    return linear


def frozen() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    model[0].requires_grad_(False)
    return model


def plainly(separate: bool) -> Callable[[nn.Module], nn.Module]:
    return lambda module: fsdp1(module, use_orig_params=separate)


def with_the_frozen_part_apart(module: nn.Module) -> nn.Module:
    """Without `use_orig_params`, torch does not mix frozen and trained parameters."""
    module.inner[0] = fsdp1(module.inner[0])
    return fsdp1(module)


def without_the_norm(module: nn.Module) -> nn.Module:
    return fsdp1(module, ignored_modules=[module.inner.norm])


def compare_named(name: str) -> None:
    compare(*PECULIAR[name])


PECULIAR: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "tied": (Tied, plainly(True)),
    "tied-flat": (Tied, plainly(False)),
    "channels-last": (channels_last, plainly(True)),
    "channels-last-flat": (channels_last, plainly(False)),
    "transposed-flat": (transposed, plainly(False)),
    "frozen": (frozen, plainly(True)),
    "frozen-flat": (frozen, with_the_frozen_part_apart),
    "ignored": (Tied, without_the_norm),
}


@pytest.mark.parametrize("name", PECULIAR)
@pytest.mark.parametrize("world_size", [2, 3])
def test_peculiar_models(workers: Pool, name: str, world_size: int) -> None:
    workers(world_size).run(compare_named, name)


# ------------------------------------------------------------------------------------------- some of the parameters


def two_optimizers_with_groups() -> None:
    """One for the matrices, with two param groups, one for the rest; each in its own order."""
    model = wrap_fsdp1(True, True, {})(Model())
    whole = dict(Model().named_parameters())
    matrices = [name for name, weight in whole.items() if weight.dim() >= 2]
    rest = [name for name in whole if name not in matrices]

    def optimizers(params: dict[str, Tensor], **arguments: Any) -> list[SM3]:
        groups = [
            {"params": [params[name] for name in matrices[::2]], "lr": 0.3},
            {"params": [params[name] for name in reversed(matrices[1::2])], "weight_decay": 0.1},
        ]
        return [
            SM3(groups, momentum=0.9, **arguments),
            SM3([params[name] for name in rest], lr=0.2, beta=0.9, **arguments),
        ]

    together = optimizers({clean(name): weight for name, weight in model.named_parameters()}, model=model)
    alone = optimizers(whole)
    for step in range(3):
        grads = {name: exact_gradient(step, name, weight.shape) for name, weight in whole.items()}
        model(grads).backward()
        for name, grad in grads.items():
            whole[name].grad = grad
        for optimizer in together + alone:
            optimizer.step()
            optimizer.zero_grad()
    for name, weight in gather_fsdp1(model).items():
        assert torch.equal(weight, whole[name]), name


def test_two_optimizers_over_one_model(workers: Pool) -> None:
    workers(3).run(two_optimizers_with_groups)


# ------------------------------------------------------------------------------------------------------ owned slices


def entries_held(separate: bool) -> tuple[int, int, int, list[str]]:
    """Stored on this rank, shared in all, sent per step in all, and tensors that are shared though they need not be."""
    model = wrap_fsdp1(True, separate, {})(Model())
    optimizer = SM3(model.parameters(), model=model)
    grads = {name: exact_gradient(0, name, weight.shape) for name, weight in Model().named_parameters()}
    model(grads).backward()
    optimizer.step()
    stored = sum(
        value.numel() for state in optimizer.state.values() for key, value in state.items() if "accumulator" in key
    )
    plan = optimizer._current_plan()
    copies, needless = 0, []
    for entry in plan.entries:
        holders: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(holders, bool(entry.shard.boxes))
        shared = sum(region.numel for s in entry.shard.shared if s is not None for region in s.regions)
        copies += shared * (sum(holders) - 1)  # no entry is stored more often than there are ranks with elements
        if sum(holders) == 1 and shared:
            needless.append(entry.label)
    return stored, copies, sum(bucket.numel for bucket in plan.buckets), needless


@pytest.mark.parametrize("separate", [True, False])
def test_a_rank_stores_what_it_touches_and_whole_tensors_send_nothing(workers: Pool, separate: bool) -> None:
    reports = workers(4).run(entries_held, separate)
    single = sum(sum(weight.shape) for weight in Model().parameters())
    stored = sum(report[0] for report in reports)
    _, copies, sent, needless = reports[0]
    assert single < stored <= single + copies
    assert sent < single
    assert needless == []


# ----------------------------------------------------------------------------------------------------- real training


def losses(separate: bool) -> list[float]:
    """The same data on every rank: averaging two or four equal gradients changes no bit."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    if dist.get_world_size() > 1:
        model = fsdp1(model, use_orig_params=separate)
    optimizer = SM3(model.parameters(), lr=0.1, momentum=0.9, model=model)
    data = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    history = []
    for _ in range(20):
        loss = (model(data) - data[:, :3].roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return history


@pytest.mark.parametrize("separate", [True, False])
def test_training_follows_one_process(workers: Pool, separate: bool) -> None:
    (alone,) = workers(1).run(losses, separate)
    assert alone[-1] < 0.5 * alone[0]
    for together in workers(4).run(losses, separate):
        assert together == alone
