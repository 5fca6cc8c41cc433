"""Gradients of every kind: none, strided, sparse."""

import copy

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from steps import parameters, weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sm3_dist import SM3


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    a, b, frozen = parameters()
    frozen.requires_grad_(False)
    optimizer = SM3([a, b, frozen], momentum=0.9, beta=0.9, weight_decay=0.1)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    kept = [copy.deepcopy((w, optimizer.state.get(p))) for w, p in zip(weights(optimizer), (a, b, frozen), strict=True)]
    a.grad, b.grad = torch.ones_like(a), None
    optimizer.step()
    assert not torch.equal(a, kept[0][0])
    for param, (weight, state) in zip((b, frozen), kept[1:], strict=True):
        assert torch.equal(param, weight)
        assert all(torch.equal(value, optimizer.state[param][key]) for key, value in (state or {}).items())
    assert optimizer.state[b]["step"] == 1


def test_every_rank_makes_the_same_state_whatever_its_gradients() -> None:
    a, b, _ = parameters()
    optimizer = SM3([a, b], momentum=0.9)
    a.grad = torch.ones_like(a)
    optimizer.step()
    assert set(optimizer.state[b]) == {"step", "accumulator_0", "momentum_buffer"}
    assert optimizer.state[b]["step"] == 0


def test_a_thawed_parameter_is_updated() -> None:
    a, b, _ = parameters()
    b.requires_grad_(False)
    optimizer = SM3([a, b])
    a.grad = torch.ones_like(a)
    optimizer.step()
    b.requires_grad_(True)
    before = b.detach().clone()
    b.grad = torch.ones_like(b)
    optimizer.step()
    assert not torch.equal(before, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start, grads = torch.randn(6, 4, 5, generator=generator).to(dtype), torch.randn(3, 6, 4, 5, generator=generator)
    results = []
    for permute in [(0, 1, 2), (2, 0, 1), (1, 2, 0)]:
        inverse = [permute.index(d) for d in range(3)]
        param = nn.Parameter(start.permute(permute).clone(memory_format=torch.contiguous_format).permute(inverse))
        optimizer = SM3([param], momentum=0.9)
        for number, grad in enumerate(grads.to(dtype)):
            strided = grad.permute(permute).contiguous().permute(inverse)
            param.grad = strided if number else grad.clone()  # parameter and gradient of different strides, too
            optimizer.step()
        results.append(param.detach())
    assert all(torch.equal(results[0], result) for result in results[1:])


def sparse_grad(rows: list[int], values: Tensor, size: tuple[int, ...]) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, size, check_invariants=True)


def test_sparse_gradient_updates_its_rows_alone() -> None:
    param = nn.Parameter(torch.ones(5, 3))
    optimizer = SM3([param], lr=0.5, momentum=0.9, weight_decay=0.1)
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 1.0], [2.0, 2.0, 2.0]])
    for _ in range(2):
        param.grad = sparse_grad([3, 1, 3], values, (5, 3))  # row 3 twice: summed first
        optimizer.step()
    expected, rows = torch.ones(5, 3), torch.zeros(5)
    summed = {1: values[1], 3: values[0] + values[2]}
    for _ in range(2):
        for row, grad in summed.items():
            nu = rows[row] + grad * grad
            expected[row] = expected[row] * (1 - 0.5 * 0.1) - (grad * torch.rsqrt(nu + 1e-30)) * 0.5
            rows[row] = nu.max()
    assert torch.equal(param, expected)
    assert torch.equal(optimizer.state[param]["accumulator_0"], rows)
    assert torch.equal(optimizer.state[param]["momentum_buffer"], torch.zeros(5, 3))


def test_sparse_gradients_of_an_embedding_train_it() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = SM3(embedding.parameters(), lr=0.1, beta=0.9)
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([2, 7, 2])).square().sum().backward()
    optimizer.step()
    changed = (embedding.weight != before).any(1).nonzero().flatten()
    assert changed.tolist() == [2, 7]


def test_sparse_gradients_of_several_sparse_dimensions() -> None:
    param = nn.Parameter(torch.zeros(3, 4))
    indices = torch.tensor([[2, 0, 2], [1, 3, 3]])
    param.grad = torch.sparse_coo_tensor(indices, torch.tensor([3.0, 1.0, 2.0]), (3, 4), check_invariants=True)
    optimizer = SM3([param], lr=1.0)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["accumulator_0"], torch.tensor([1.0, 0.0, 9.0]))
    assert torch.equal(optimizer.state[param]["accumulator_1"], torch.tensor([0.0, 9.0, 0.0, 4.0]))
    assert torch.equal(param, -(param.grad.to_dense() != 0).float())


def test_an_empty_sparse_gradient_changes_nothing() -> None:
    param = nn.Parameter(torch.ones(3, 2))
    param.grad = sparse_grad([], torch.zeros(0, 2), (3, 2))
    SM3([param]).step()
    assert torch.equal(param, torch.ones(3, 2))


def test_dense_gradients_may_follow_sparse_ones() -> None:
    """Whatever the cover, an entry bounds from above what was summed for every element that it covers."""
    param = nn.Parameter(torch.zeros(4, 3))
    optimizer = SM3([param])
    total = torch.zeros(4, 3)
    for step in range(4):
        grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        if step % 2 == 0:
            grad[1:3] = 0
            param.grad = sparse_grad([0, 3], grad[[0, 3]], (4, 3))
        else:
            param.grad = grad
        optimizer.step()
        total += grad * grad
        state = optimizer.state[param]
        assert (state["accumulator_0"] >= total.amax(1) * 0.999999).all()
        assert (state["accumulator_1"] >= total.amax(0) * 0.999999).all()


def of_another_cut() -> None:
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 3), init_device_mesh("cpu", (2,)), [Shard(0)]))
    local = torch.ones(3 if dist.get_rank() else 1, 3)
    shape = {"shape": weight.shape, "stride": weight.stride()}
    weight.grad = DTensor.from_local(local, weight.device_mesh, weight.placements, run_check=False, **shape)
    SM3([weight]).step()


def test_a_gradient_that_is_cut_otherwise_is_told(workers: Pool) -> None:
    workers(2).run_raises(
        ValueError, of_another_cut, match="holds 6 elements, but of its gradient [39], with the same placements"
    )
