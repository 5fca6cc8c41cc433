"""What is wrong with a flattened model is told on every rank, with what to do; nothing is trained wrongly meanwhile."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from importlib import metadata

import pytest
import torch
import torch.distributed as dist
from flat_layouts import LAYOUTS, FullyShardedDataParallel, Model, exact_gradient, fsdp1, gather_fsdp1
from harness import Pool
from torch import nn

from sm3_dist import SM3

GRADS = {name: exact_gradient(0, name, weight.shape) for name, weight in Model().named_parameters()}
WRAPPED = ["fsdp1-nested", "fsdp1-flat-nested", "fairscale-nested", "fairscale-separate-nested"]


def wrapped(name: str) -> nn.Module:
    return LAYOUTS[name].wrap(Model())


def without_model(name: str) -> None:
    SM3(wrapped(name).named_parameters())


@pytest.mark.parametrize("name", WRAPPED)
def test_without_model_names_the_parameter_and_says_what_to_pass(workers: Pool, name: str) -> None:
    expected = r"parameter '.*(root|flat_param).*' was flattened .* SM3\(model.parameters\(\), model=model\)"
    workers(2).run_raises(ValueError, without_model, name, match=expected)


def with_another_model(name: str) -> None:
    SM3(wrapped(name).parameters(), model=wrapped(name))


@pytest.mark.parametrize("name", WRAPPED)
def test_with_the_wrong_model(workers: Pool, name: str) -> None:
    expected = "parameter 0 of param group 0 was flattened .* no parameter of the FullyShardedDataParallel"
    workers(2).run_raises(ValueError, with_another_model, name, match=expected)


def wrapped_anew(name: str) -> None:
    """What accelerate does: other parameters take the place of those that the optimizer was made with."""
    model = wrapped(name)
    optimizer = SM3(model.parameters(), model=model)
    model(GRADS).backward()
    optimizer.step()
    again = wrapped(name)
    optimizer.param_groups[0]["params"] = list(again.parameters())
    again(GRADS).backward()
    optimizer.step()


@pytest.mark.parametrize("name", WRAPPED)
def test_after_wrapping_anew(workers: Pool, name: str) -> None:
    workers(2).run_raises(ValueError, wrapped_anew, name, match=r"call optimizer.attach\(model\)")


def wrapped_after_a_step() -> None:
    """With `use_orig_params` the parameters stay the same objects, and lose their shapes."""
    holder = nn.Sequential(Model())
    optimizer = SM3(holder.parameters(), model=holder)
    holder(GRADS).backward()
    optimizer.step()
    optimizer.zero_grad()
    holder[0] = fsdp1(holder[0], use_orig_params=True)
    holder(GRADS).backward()
    optimizer.step()


def test_wrapping_after_a_step(workers: Pool) -> None:
    workers(3).run_raises(ValueError, wrapped_after_a_step, match="laid out otherwise than when its state was made")


def step_while_gathered(name: str) -> None:
    model = wrapped(name)
    optimizer = SM3(model.parameters(), model=model)
    for _ in range(2):
        model(GRADS).backward()
        optimizer.step()
    before = gather_fsdp1(model)
    with FullyShardedDataParallel.summon_full_params(model), pytest.raises(RuntimeError, match="gathered at present"):
        optimizer.step()
    assert all(torch.equal(weight, before[name]) for name, weight in gather_fsdp1(model).items())
    optimizer.step()  # the gradients are still there, and everybody goes on
    assert not torch.equal(gather_fsdp1(model)["root"], before["root"])


@pytest.mark.parametrize("name", ["fsdp1-nested", "fsdp1-flat-nested"])
def test_a_step_while_parameters_are_gathered(workers: Pool, name: str) -> None:
    workers(2).run(step_while_gathered, name)


def group_is_gone() -> None:
    group = dist.new_group([0, 1])
    model = fsdp1(Model(), process_group=group)
    dist.destroy_process_group(group)
    SM3(model.parameters(), model=model)


def test_a_process_group_that_is_gone(workers: Pool) -> None:
    workers(2).run_raises(ValueError, group_is_gone, match="a process group that does not exist any more")


def copied() -> None:
    model = wrapped("fsdp1-nested")
    copy.deepcopy(SM3(model.parameters(), model=model))


def test_a_copy_would_not_belong_to_the_model(workers: Pool) -> None:
    workers(2).run_raises(TypeError, copied, match="cannot be copied or pickled")


def forget_shapes(model: nn.Module) -> None:
    for module in FullyShardedDataParallel.fsdp_modules(model):
        del module._handle.flat_param._shapes  # type: ignore[union-attr]


def rename_handle(model: nn.Module) -> None:
    for module in FullyShardedDataParallel.fsdp_modules(model):
        module._flat_handle = module.__dict__.pop("_handle")


def move_cuts(model: nn.Module) -> None:
    """As if torch laid tensors out in another order."""
    for module in FullyShardedDataParallel.fsdp_modules(model):
        flat = module._handle.flat_param  # type: ignore[union-attr]
        flat._shard_param_infos = flat._shard_param_infos[::-1]


def with_another_torch(change: Callable[[nn.Module], None]) -> None:
    model = wrapped("fsdp1-nested")
    change(model)
    SM3(model.parameters(), model=model)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (forget_shapes, "keeps no _shapes on a"),
        (rename_handle, "keeps no _handle on a FullyShardedDataParallel"),
        (move_cuts, "lays out flat parameters in a way not known here"),
    ],
)
def test_another_version_of_torch(workers: Pool, change: Callable[[nn.Module], None], expected: str) -> None:
    version = re.escape(metadata.version("torch"))
    workers(2).run_raises(RuntimeError, with_another_torch, change, match=f"torch {version} .*{expected}")


def tensor_parallel_inside() -> None:
    """FSDP1 over tensor parallel flattens the local shards of DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(nn.Sequential(nn.Linear(4, 6)), mesh["tp"], {"0": ColwiseParallel()})
    model = fsdp1(model, device_mesh=mesh["dp"], use_orig_params=True)
    SM3(model.parameters(), model=model)


def test_tensor_parallel_under_fsdp1_is_refused(workers: Pool) -> None:
    workers(4).run_raises(NotImplementedError, tensor_parallel_inside, match="itself the shard of a DTensor.* FSDP2")


def different_settings(name: str) -> None:
    model = wrapped(name)
    optimizer = SM3(model.parameters(), lr=0.1 + dist.get_rank(), model=model)
    model(GRADS).backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["fsdp1-nested", "fsdp1-flat-nested"])
def test_ranks_that_differ_are_told_so(workers: Pool, name: str) -> None:
    workers(2).run_raises(
        RuntimeError, different_settings, name, match="rank 0 has 9 tensors.*\n.*rank 1 has 9 tensors"
    )
