"""A schedule that starts at 0 takes steps as any other; only the step of PyTorch's checkpoint code does not count."""

import torch
from harness import Pool
from layouts import full
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as torch_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

from sm3_dist import SM3

TOKENS = ([0, 1, 2], [0, 5, 7], [1, 6, 4], [2, 3, 7])
"""The first are of rows that rank 0 holds: the other rank's gradient is 0 in every element."""


def trained(sharded: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 4))
    if sharded:
        fully_shard(model)
    optimizer = SM3.adamw_like(model.parameters(), lr=1e-2)
    scheduler = LambdaLR(optimizer, lambda step: min(1, step / 3))
    for tokens in TOKENS:
        optimizer.zero_grad()
        (model(torch.tensor(tokens)) * torch.arange(1.0, 5)).sum().backward()
        optimizer.step()
        scheduler.step()
    weight = model[0].weight
    return [optimizer.state[weight]["step"], full(weight)]


def test_a_first_step_at_lr_0_counts_on_every_rank(workers: Pool) -> None:
    step, weight = trained(sharded=False)
    assert step == len(TOKENS)
    for theirs in workers(2).run(trained, True):
        assert theirs[0] == step
        assert torch.equal(theirs[1], weight)


def test_the_step_of_the_checkpoint_code_does_not_count() -> None:
    model = nn.Linear(4, 3)
    optimizer = SM3.adamw_like(model.parameters(), lr=1e-2)
    saved = torch_state_dict.get_optimizer_state_dict(model, optimizer)
    assert saved["state"]["weight"]["step"] == 0
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["step"] == 1
