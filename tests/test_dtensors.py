"""DTensors that are no boxes of a tensor, or whose gradients are not placed as they are."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from layouts import LAYOUTS, Tensors, full
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.placement_types import _StridedShard

from sm3_dist import SM3


def partial_parameter() -> None:
    mesh = init_device_mesh("cpu", (2,))
    SM3([("weight", torch.nn.Parameter(DTensor.from_local(torch.ones(3, 2), mesh, [Partial()])))])


def test_partial_parameters_are_refused(workers: Pool) -> None:
    workers(2).run_raises(ValueError, partial_parameter, match=r"'weight' has placement .*summand.*Redistribute")


def strange_parameters() -> None:
    mesh = init_device_mesh("cpu", (2,))
    wrong = DTensor.from_local(torch.ones(3, 2), mesh, [Shard(0)], shape=torch.Size((8, 2)), stride=(2, 1))
    with pytest.raises(ValueError, match=r"'w': the local tensor has shape \(3, 2\), .* give this rank \(4, 2\)"):
        SM3([("w", torch.nn.Parameter(wrong))])
    apart = DTensor.from_local(
        torch.ones(4, 2), mesh, [_StridedShard(0, split_factor=2)], shape=torch.Size((8, 2)), stride=(2, 1)
    )
    start = 2 * dist.get_rank()
    ranges = rf"\[\({start}, {start + 2}\), \({start + 4}, {start + 6}\)\] of dimension 0"
    with pytest.raises(NotImplementedError, match=f"the separate ranges {ranges}"):
        SM3([("w", torch.nn.Parameter(apart))])
    elsewhere = DeviceMesh("cpu", [1 - dist.get_rank()], _init_backend=False)
    away = DTensor.from_local(torch.ones(0), elsewhere, [Replicate()], run_check=False)
    with pytest.raises(ValueError, match=rf"'w': this rank is not part of its mesh of ranks \[{1 - dist.get_rank()}\]"):
        SM3([("w", torch.nn.Parameter(away))])


def test_dtensors_of_which_a_rank_holds_no_box_are_refused(workers: Pool) -> None:
    workers(2).run(strange_parameters)


def partial_gradients() -> None:
    """What autograd leaves to be summed is summed, as other optimizers do it."""
    mesh = init_device_mesh("cpu", (2,))
    param = torch.nn.Parameter(DTensor.from_local(torch.zeros(3, 2), mesh, [Replicate()]))
    param.grad = DTensor.from_local(torch.full((3, 2), 1.0 + dist.get_rank()), mesh, [Partial()])
    optimizer = SM3([param], lr=1.0)
    optimizer.step()
    assert torch.equal(full(optimizer.state[param]["accumulator_0"]), torch.full((3,), 9.0))


def test_partial_gradients_are_summed(workers: Pool) -> None:
    workers(2).run(partial_gradients)


def plain_gradient() -> None:
    model = LAYOUTS["fsdp2"].wrap(Tensors())
    optimizer = SM3(model.parameters())
    param = next(model.parameters())
    with patch.object(type(param), "grad", torch.ones(3, 5)):
        optimizer.step()


def test_a_plain_gradient_of_a_dtensor_is_refused(workers: Pool) -> None:
    workers(2).run_raises(TypeError, plain_gradient, match="is a DTensor, but its gradient is a plain tensor")
