"""What steps take for themselves, by formula, against what PyTorch allocates in one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adafactor, AdamW, Muon, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sm3_dist
from sm3_dist.maths import orthogonal
from sm3_dist.planner import step_temporaries as formulas
from sm3_dist.planner.sharding import Sharding
from sm3_dist.planner.step_temporaries import step_temporaries

SHAPES = [(1000, 64), (64, 64), (64, 64), (256, 64), (64, 256), (64,), (900, 64)]


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors that operations make and that are alive at a time.

    Attributes:
        most: the most of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(storage := leaf.untyped_storage()) not in given | self._known:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._known.add(key)
        self._now += size
        self.most = max(self.most, self._now)

        def free() -> None:
            self._known.discard(key)
            self._now -= size

        weakref.finalize(storage, free)


def parameters(shapes: Sequence[tuple[int, ...]]) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def taken(make: Callable[[list[nn.Parameter]], Optimizer], shapes: Sequence[tuple[int, ...]]) -> int:
    """The bytes that the second step of an optimizer takes for itself."""
    optimizer = make(parameters(shapes))
    optimizer.step()
    with Allocations() as allocations:
        optimizer.step()
    return allocations.most


def planned(name: str, shapes: Sequence[tuple[int, ...]], **options: Any) -> int:
    return step_temporaries(Sharding.of(nn.ParameterList(parameters(shapes)), **options))[name]


def test_adamw_copies_all_that_it_steps() -> None:
    assert planned("adamw", SHAPES) == taken(lambda params: AdamW(params, foreach=True), SHAPES)
    assert taken(lambda params: AdamW(params, fused=True), SHAPES) == 0


@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[1:6]])
def test_adamw_takes_tensors_that_are_cut_one_after_another(shapes: list[tuple[int, ...]]) -> None:
    loop = taken(lambda params: AdamW(params, foreach=False), shapes)
    assert planned("adamw", shapes, world=1, wrapper="fsdp2") == loop
    assert planned("adamw", shapes, world=4, wrapper="fsdp2") == loop // 4


@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[1:6]])
def test_adafactor_copies_tensors_one_after_another(shapes: list[tuple[int, ...]]) -> None:
    rows_and_columns = 4 * sum(max(each) for each in zip(*((s[0], s[-1]) for s in shapes), strict=True))
    assert 0 <= taken(Adafactor, shapes) - planned("adafactor", shapes) <= rows_and_columns


@pytest.mark.parametrize("matrices", [[(64, 64)] * 3, [(256, 64), (64, 64)], [(64, 1024)], [(48, 80)] * 2])
def test_muon_takes_one_matrix_after_another(matrices: list[tuple[int, ...]]) -> None:
    assert planned("muon", matrices) == taken(Muon, matrices)
    assert planned("muon", matrices, world=4, wrapper="zero1") == taken(Muon, matrices), "the whole of it on its owner"


def test_the_rest_of_muon_is_adamws() -> None:
    module = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 64))
    assert step_temporaries(Sharding.of(module))["muon"] == 4 * (1000 * 64 + 64)


def test_adam_mini_copies_the_largest_tensor_twice() -> None:
    assert planned("adam-mini", SHAPES) == 2 * 4 * 1000 * 64


@pytest.mark.parametrize("shapes", [[(128, 128)] * 6, [(64, 256), (256, 64)] * 2, [(32, 500)] * 3])
def test_what_is_made_orthogonal_takes_at_most_10_bytes_per_element(shapes: list[tuple[int, ...]]) -> None:
    """As on a GPU: in batches, whose products are of bfloat16."""
    updates = [torch.ones(shape, dtype=torch.bfloat16) for shape in shapes]
    with mock.patch.object(orthogonal, "product_type", return_value=torch.bfloat16):
        orthogonal._in_batches(updates)
        with Allocations() as allocations:
            orthogonal._in_batches(updates)
    elements = sum(update.numel() for update in updates)
    assert 0.4 < allocations.most / (formulas._ORTHOGONAL * elements) <= 1


@pytest.mark.parametrize("wrapper", ["none", "ddp", "zero1", "fsdp2", "hsdp", "fsdp1"])
def test_buckets_are_no_larger_than_planned(wrapper: str) -> None:
    """Of 85 MB of updates, in buckets of 25."""
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(1536, 1536, bias=False) for _ in range(18)))
    told: dict[str, Any] = {"world": 1 if wrapper == "none" else 4, "wrapper": wrapper}
    names = [name for name, _ in module.named_parameters()]
    buffers = max(rank.exchanged for rank in sm3_dist.plan(module, **told, orthogonalize=names))
    most = step_temporaries(Sharding.of(module, **told))["sm3-muon-like"]
    travels = wrapper not in ("none", "ddp")
    work = (formulas._ORTHOGONAL + formulas._PUT_TOGETHER * travels) * 12_500_000
    assert buffers + work <= most <= 3 * buffers + work
