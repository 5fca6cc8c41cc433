"""The C backend's threads: PyTorch's or its own, and after a fork."""

import os
import sys

import pytest
import torch
from against_eager import RECIPE, SHAPES, compare, needs_c, threads
from torch import nn

from sm3_dist import SM3
from sm3_dist.compiled.library import parallel
from sm3_dist.kernels.c import backend as cpu

pytestmark = pytest.mark.usefixtures("one_thread")


@needs_c
@pytest.mark.parametrize("settings", [{"momentum": 0.9}, RECIPE | {"cover_block": 32}], ids=str)
def test_threads_of_its_own_do_as_those_of_pytorch(settings, monkeypatch):
    monkeypatch.setattr(cpu, "parallel", lambda process: None)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in SHAPES]
    compare(weights, [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(4)], **settings)


@needs_c
@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has another OpenMP runtime")
def test_pytorchs_threads_are_found_but_not_after_a_fork():
    assert parallel(os.getpid()) is not None
    assert parallel(os.getpid() + 1) is None


@needs_c
def test_a_fork_after_a_step_can_step_too():
    """PyTorch's threads are lost in a fork, and waiting for them would not end."""
    weight = nn.Parameter(torch.ones(300, 300))
    weight.grad = torch.ones(300, 300)
    optimizer = SM3([weight], lr=0.1, backend="c")
    with threads(2):
        optimizer.step()
        child = os.fork()
        if child == 0:
            optimizer.step()
            os._exit(0 if weight[299, 299].item() < 0.9 else 1)
        optimizer.step()
    assert os.waitpid(child, 0)[1] == 0


@needs_c
def test_a_vector_beside_a_matrix_disturbs_no_other_thread():
    """One thread steps the vector while another walks the matrix: what they gather on the way lies apart."""

    def trained(backend: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((66, 70), (66,))]
        optimizer = SM3.adamw_like(params, lr=1e-2, backend=backend)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
        return params[0].detach()

    expected = trained("eager")
    with threads(2):
        assert all(torch.equal(trained("c"), expected) for _ in range(200))
