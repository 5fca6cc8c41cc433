"""Orthogonal updates: what they are; weights and state are one process's to the last bit under every wrapper."""

from __future__ import annotations

import math
from collections import Counter
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import against_reference
import flat_layouts
import layouts
import pytest
import replicas
import test_flat
import torch
import torch.distributed as dist
from harness import Pool
from layouts import LAYOUTS, Tensors, give
from sampling import crossed
from test_planning import WRAP, given
from test_planning import model as planned_model
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import sm3_dist
from sm3_dist import SM3, GradientMismatchError, step_in_backward
from sm3_dist.layout.box import Box
from sm3_dist.maths import orthogonal as maths
from sm3_dist.maths.orthogonal import length, orthogonalized
from sm3_dist.ranks import matrix_exchange

MUON: dict[str, Any] = {"momentum": 0.95, "beta": 0.95, "bias_correction": True, "nesterov": True}
MUON |= {"orthogonalize": True}
OPTIONS: list[dict[str, Any]] = [
    MUON,
    {**MUON, "cover_block": 2, "cover_product": True, "update_rms": 1.0, "weight_decay": 0.1},
    {"orthogonalize": True, "maximize": True},
]
NARROW: list[dict[str, Any]] = [
    {"momentum_dtype": torch.bfloat16, "rounding_seed": 7},
    {"momentum_dtype": torch.int8, "rounding_seed": 8},
]


SMALL_BUCKETS = patch.object(matrix_exchange, "BUCKET_BYTES", 100)  # several, of one or two matrices each


def compare_dtensors(name: str, kind: int) -> None:
    if kind < len(OPTIONS):
        against_reference.compare_with_reference(name, OPTIONS[kind])
    elif kind == len(OPTIONS):
        with SMALL_BUCKETS:
            against_reference.compare_with_reference(name, MUON)
    else:
        keywords = NARROW[kind - len(OPTIONS) - 1]
        against_reference.compare_with_reference(name, MUON, torch.bfloat16, **keywords)


KINDS = range(len(OPTIONS) + 1 + len(NARROW))


@pytest.mark.sampled("name, world_size, kind", crossed(layouts.cases(), KINDS))
def test_dtensors_equal_one_process(workers: Pool, name: str, world_size: int, kind: int) -> None:
    workers(world_size).run(compare_dtensors, name, kind)


def compare_flat(name: str, in_small_buckets: bool) -> None:
    if in_small_buckets:
        with SMALL_BUCKETS:
            test_flat.compare_with_reference(name, MUON, torch.float32, **NARROW[1])
    else:
        test_flat.compare_with_reference(name, OPTIONS[1])


@pytest.mark.sampled("name, world_size, in_small_buckets", crossed(flat_layouts.cases(), [False, True]))
def test_flat_tensors_equal_one_process(workers: Pool, name: str, world_size: int, in_small_buckets: bool) -> None:
    workers(world_size).run(compare_flat, name, in_small_buckets)


REPLICAS: list[dict[str, Any]] = [*OPTIONS, {**MUON, "momentum_dtype": torch.bfloat16, "stochastic_rounding": True}]


def compare_replicas(options: dict[str, Any]) -> str:
    with SMALL_BUCKETS:
        return replicas.train_beside_one_process(
            replicas.params_of(), replicas.BUCKETING["small-buckets"], lr=0.3, **options
        )


@pytest.mark.sampled("world_size, options", crossed([2, 3, 4], range(len(REPLICAS))))
def test_replicas_equal_one_process(workers: Pool, world_size: int, options: int) -> None:
    replicas.assert_replicas(workers(world_size).run(compare_replicas, REPLICAS[options]))


def bytes_that_travel(name: str) -> tuple[int, int, int]:
    """Bytes of bfloat16 that this rank holds of the matrices that are cut, those it sends, and the number of calls."""
    shapes = [(64, 32), (32,), (48, 16), (8, 4, 4), (32, 96), (5, 7)]
    model = LAYOUTS[name].wrap(Tensors(shapes))
    optimizer = SM3(model.parameters(), **MUON)
    for param in model.parameters():
        give(param, torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel())))
    optimizer.step()
    sent: Counter[str] = Counter()
    collective = dist.all_to_all_single

    def counting(output: Tensor, given: Tensor, received: list[int], out: list[int], **keywords: Any) -> Any:
        rank = dist.get_rank(keywords["group"])
        sent["bytes"] += given.element_size() * (sum(out) - out[rank])
        sent["calls"] += 1
        return collective(output, given, received, out, **keywords)

    with CommDebugMode() as comm, patch.object(dist, "all_to_all_single", counting):
        optimizer.step()
    assert sum(comm.get_comm_counts().values()) - len(optimizer._current_plan().buckets) == sent["calls"]
    planned = [bucket.exchange.nbytes for bucket in optimizer._current_plan().orthogonal.buckets]
    assert sum(map(sum, planned)) == sent["bytes"]
    entries = optimizer._current_plan().entries
    cut = [entry for entry in entries if entry.shard.holders and len(entry.shard.shape) > 1]
    return 2 * sum(math.prod(entry.shard.shape) for entry in cut), sent["bytes"], sent["calls"]


@pytest.mark.parametrize(("name", "world_size", "calls"), [("fsdp2", 4, 2), ("tp-2d", 4, 4), ("ddp", 2, 0)])
def test_what_travels(workers: Pool, name: str, world_size: int, calls: int) -> None:
    """Each element of a matrix that is cut, there and back, unless the owner holds it; of others nothing.

    Two calls for each group of ranks that hold matrices together.
    """
    results = workers(world_size).run(bytes_that_travel, name)
    words = 200  # one for each matrix, rank and way
    if name == "fsdp2":
        whole = results[0][0]
        assert sum(sent for _, sent, _ in results) <= 2 * whole * 3 / 4 + 3 * words
        assert max(sent for _, sent, _ in results) <= 2 * whole / 4 * 1.2 + words
    assert [made for _, _, made in results] == [calls] * world_size


def test_large_matrices_are_shared_out_evenly() -> None:
    layer = [768 * 768 * 768] * 4 + [768 * 3072 * 768] * 2
    chosen, order = matrix_exchange.owners(layer * 12, [dict.fromkeys(range(8), 1)] * 72)
    loads = Counter(dict.fromkeys(range(8), 0))
    for work, owner in zip(layer * 12, chosen, strict=True):
        loads[owner] += work
    assert max(loads.values()) <= 1.01 * min(loads.values())
    assert len({chosen[k] for k in order[:8]}) == 8


def owner_of_the_matrix_that_is_cut() -> list[int]:
    shapes = [(30, 40), (20, 40), (1200,)]  # the first matrix lies on rank 0, and half of the second one
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    buckets = SM3(params, shard_over=dist.group.WORLD, **MUON)._current_plan().orthogonal.buckets
    return [matrix.owner for bucket in buckets for matrix in bucket.exchange.matrices if len(matrix.boxes) > 1]


def test_who_has_whole_matrices_owns_fewer_of_the_others(workers: Pool) -> None:
    assert workers(2).run(owner_of_the_matrix_that_is_cut) == [[1], [1]]


def test_buckets_are_as_large_as_they_may_be() -> None:
    """On no rank larger than the limit, or than the largest matrix, in what it sends and in what it receives."""
    rows = {rank: (Box((2 * rank, 0), (2 * rank + 2, 8)),) for rank in range(4)}
    matrices = [matrix_exchange.Matrix((8, 8), None, rows, owner) for owner in [0, 1, 2, 3] * 3 + [0, 0]]
    with SMALL_BUCKETS:
        assert matrix_exchange.bucketed(matrices, 2) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12], [13]]
    assert matrix_exchange.bucketed(matrices, 2) == [list(range(14))]


def one_rank_without_a_gradient(lag: int) -> None:
    model = LAYOUTS["tp"].wrap(Tensors([(6, 4), (4, 6)]))
    optimizer = SM3(model.named_parameters(), **MUON)
    for number, param in enumerate(model.parameters()):
        give(param, torch.ones(param.shape))
        if dist.get_rank() == 1 and number == 1:
            param.grad = None
    for bucket in optimizer._current_plan().orthogonal.buckets:
        bucket.exchange._mixed._lag = lag
    for _ in range(lag):
        optimizer.step()
    with pytest.raises(GradientMismatchError, match=r"parameter 'blocks.0.1' has a gradient on some of the ranks"):
        optimizer.step()


@pytest.mark.parametrize("lag", [0, 2])  # on a GPU the host hears of it two steps later
def test_a_gradient_on_some_ranks_alone_is_an_error_on_every_rank(workers: Pool, lag: int) -> None:
    workers(3).run(one_rank_without_a_gradient, lag)


class Counted:
    """A collective that knows whether somebody has waited for it."""

    def __init__(self, work: dist.Work) -> None:
        self.work, self.has_ended = work, False

    def wait(self, *timeout: timedelta) -> None:
        self.work.wait(*timeout)
        self.has_ended = True

    def is_completed(self) -> bool:
        return self.work.is_completed()


def an_error_while_others_travel() -> None:
    """A library that still reads and writes must find memory; the next step goes on as if nothing had been sent."""
    sent: list[tuple[Counted, Tensor, Tensor]] = []

    def all_to_all_single(output: Tensor, given: Tensor, *sizes: Any, **options: Any) -> Counted:
        sent.append((Counted(dist.distributed_c10d.all_to_all_single(output, given, *sizes, **options)), output, given))
        return sent[-1][0]

    model = LAYOUTS["fsdp2"].wrap(Tensors([(6, 4)] * 12))
    optimizer = SM3(model.parameters(), **MUON)
    params = list(model.parameters())
    with SMALL_BUCKETS, patch.object(dist, "all_to_all_single", all_to_all_single):
        buckets = [bucket.exchange for bucket in optimizer._current_plan().orthogonal.buckets]
        for param in params:
            give(param, torch.ones(param.shape))
        params[0].grad = None if dist.get_rank() else params[0].grad
        with pytest.raises(GradientMismatchError):
            optimizer.step()
        travelling = [tensors for work, *tensors in sent if not work.has_ended]
        assert len(buckets) == 3
        assert len(travelling) == 2
        assert all(tensor.untyped_storage().nbytes() for pair in travelling for tensor in pair)
        give(params[0], torch.ones(6, 4))
        optimizer.step()
    assert all(work.has_ended for work, *_ in sent)
    assert not any(bucket._buffer.untyped_storage().nbytes() for bucket in buckets)


def test_buckets_that_travel_keep_their_memory_when_a_step_ends_with_an_error(workers: Pool) -> None:
    workers(2).run(an_error_while_others_travel)


def memory_between_steps() -> None:
    model = LAYOUTS["fsdp2"].wrap(Tensors([(64, 32), (48, 16)]))
    optimizer = SM3(model.parameters(), **MUON)
    for step in range(2):
        for param in model.parameters():
            give(param, torch.ones(param.shape))
        optimizer.step()
        for bucket in optimizer._current_plan().orthogonal.buckets:
            assert bucket.exchange._buffer.untyped_storage().nbytes() == 0, step


def test_buckets_are_freed_after_a_step(workers: Pool) -> None:
    workers(2).run(memory_between_steps)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50), (20, 5, 6), (1, 30)])
def test_singular_values_are_about_1(shape: tuple[int, ...]) -> None:
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, stretched, v = torch.linalg.svd(update.flatten(1), full_matrices=False)
    update = (u * torch.linspace(0.1, 1, len(stretched)) @ v).view(shape)
    result = orthogonalized(update.bfloat16())
    assert result.shape == shape
    values = torch.linalg.svdvals(result.float().flatten(1))
    assert values.min() > 0.6
    assert values.max() < 1.25
    rms = (result.float() * length(shape)).square().mean().sqrt()
    assert 0.13 < rms < 0.25
    along = u.T @ result.float().flatten(1) @ v.T  # the same directions
    assert (along - along.diagonal().diag()).abs().max() < 0.05


def test_lengths_do_not_matter_nor_where_it_lies() -> None:
    update = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(orthogonalized(update * 2.0**-9), orthogonalized(update))
    assert torch.equal(orthogonalized(update.T.contiguous().T), orthogonalized(update))
    assert not orthogonalized(torch.zeros(4, 3).bfloat16()).count_nonzero()


BATCHED = [(24, 16), (16, 24), (8, 40), (5, 7), (8, 4, 6)]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_bits_do_not_depend_on_what_is_worked_on_together(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """What GPUs do, on the CPU, where a library of products may add up a batch in another order."""
    generator = torch.Generator().manual_seed(0)
    updates = [torch.randn(shape, generator=generator).bfloat16() for _ in range(count) for shape in BATCHED]
    alone = [orthogonalized(update) for update in updates]
    maths.batch_is_exact.cache_clear()
    assert all(map(torch.equal, maths._in_batches(updates), alone))
    asked = []
    monkeypatch.setattr(maths, "batch_is_exact", lambda *case: not asked.append(case))  # though it may not be
    for each, expected in zip(maths._in_batches(updates), alone, strict=True):
        torch.testing.assert_close(each, expected, rtol=0.02, atol=0.01)
    of_shape = {(count * 2, 16, 24), (count, 8, 40), (count, 5, 7), (count, 8, 24)}
    assert {case[:3] for case in asked} == {case for case in of_shape if case[0] > 1}


def test_a_batch_that_adds_up_in_another_order_is_not_worked_on_together(monkeypatch: pytest.MonkeyPatch) -> None:
    power = maths._fifth_power

    def off_by_a_bit(x: Tensor, *coefficients: float) -> Tensor:
        result = power(x, *coefficients)
        return result if x.dim() == 2 else torch.nextafter(result, torch.tensor(9.0))

    maths.batch_is_exact.cache_clear()
    monkeypatch.setattr(maths, "_fifth_power", off_by_a_bit)
    monkeypatch.setattr(maths, "product_type", lambda device: torch.float32)
    assert not maths.batch_is_exact(3, 16, 24, torch.device("cpu"))
    maths.batch_is_exact.cache_clear()


def test_vectors_are_left_as_they_are() -> None:
    usual, other = (torch.nn.Parameter(torch.ones(7)) for _ in range(2))
    for param, options in ((usual, {}), (other, {"orthogonalize": True})):
        param.grad = torch.linspace(-1, 2, 7)
        SM3([param], **options).step()
    assert torch.equal(usual, other)


@pytest.mark.parametrize("wanted", ["weight", 3, [3]])
def test_what_is_not_names_is_refused(wanted: Any) -> None:
    with pytest.raises(ValueError, match="orthogonalize must be True, False or names of tensors"):
        SM3([torch.nn.Parameter(torch.ones(2, 2))], orthogonalize=wanted)


def test_names_may_come_from_what_is_gone_through_once() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.ones(2, 2))]} for _ in range(2)]
    optimizer = SM3(groups, orthogonalize=(name for name in ("second", "first")))
    assert [group["orthogonalize"] for group in optimizer.param_groups] == [("first", "second")] * 2


def test_sparse_gradients_are_refused() -> None:
    table = torch.nn.Embedding(5, 4, sparse=True)
    optimizer = SM3(table.parameters(), orthogonalize=True)
    table(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(NotImplementedError, match="sparse gradient, whose update cannot be made orthogonal"):
        optimizer.step()


def test_steps_in_backward_are_refused() -> None:
    layer = torch.nn.Linear(4, 3)
    with pytest.raises(ValueError, match="with orthogonalize a step needs the whole update"):
        step_in_backward(layer, SM3(layer.parameters(), orthogonalize=True))


def test_a_grad_scaler_changes_nothing() -> None:
    """The scale is a power of 2; a gradient that is not finite stops the step."""
    plain, scaled = (torch.nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3)) for _ in range(2))
    grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    plain.grad, scaled.grad = grad.clone(), grad * 1024
    optimizer = SM3([scaled], unscale_in_step=True, **MUON)
    SM3([plain], **MUON).step()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    optimizer.step()
    assert torch.equal(plain, scaled)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(plain, scaled)


def planned_buffers(wrapper: str) -> None:
    """The bytes of the buffers of three buckets in a row, of a small size, as planned and as made."""
    module = planned_model(torch.float32, wrapper)
    told = given(wrapper, module)
    names = [name for name, _ in module.named_parameters()]
    with SMALL_BUCKETS:
        planned = sm3_dist.plan(module, **told, orthogonalize=names)[dist.get_rank()]
        wrapped = WRAP.get(wrapper, lambda module: module)(module)
        keywords: dict[str, Any] = {"shard_over": dist.group.WORLD} if wrapper == "zero1" else {}
        optimizer = SM3(wrapped.parameters(), model=wrapped, orthogonalize=True, **keywords)
        buckets = optimizer._current_plan().orthogonal.buckets
    sizes = [
        2 * (sum(bucket.exchange._sent) + (sum(bucket.exchange._received) if bucket.exchange.group else 0))
        for bucket in buckets
    ]
    assert sizes
    windows = [sum(sizes[k : k + 3]) for k in range(len(sizes))]
    assert planned.exchanged == max(windows), (planned.exchanged, sizes)


@pytest.mark.parametrize(("wrapper", "world_size"), [("fsdp2", 3), ("hsdp", 4), ("zero1", 3), ("fsdp1", 2), ("tp", 2)])
def test_the_plan_knows_the_buffers(workers: Pool, wrapper: str, world_size: int) -> None:
    workers(world_size).run(planned_buffers, wrapper)
