"""A few parameters, steps with gradients that are the same everywhere, and the comparison of two optimizers."""

import torch
from torch import Tensor, nn


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(4, 3), (5,), (2, 3, 2)]]


def take_steps(optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    """Steps with gradients that depend on nothing but the shapes, the seed and the number of the step."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param.detach() for group in optimizer.param_groups for param in group["params"]]


def assert_equal(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Same weights and state, in the order of the param groups, to the last bit."""
    for one, other in zip(weights(a), weights(b), strict=True):
        assert torch.equal(one, other)
    states = [[optimizer.state[p] for g in optimizer.param_groups for p in g["params"]] for optimizer in (a, b)]
    for one, other in zip(*states, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
