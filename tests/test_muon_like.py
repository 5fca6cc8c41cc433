"""The recipe that makes matrices orthogonal: what it takes for matrices, under any wrapper; and its state moves."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from flat_layouts import LAYOUTS, Model, exact_gradient
from harness import Pool
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.utils.parametrizations import weight_norm

from launch.job.model import GPT, PRESETS
from launch.job.recipe import sm3_muon_like
from launch.job.settings import Settings
from launch.job.world import UserError
from sm3_dist import SM3, MuonLikeSM3
from sm3_dist.checkpoint import get_optimizer_state_dict, set_optimizer_state_dict
from sm3_dist.step.param_groups import ADAMW_LIKE, MATRIX

WHOLE = StateDictOptions(full_state_dict=True)


def chosen(optimizer: SM3, model: nn.Module) -> dict[bool, set[str]]:
    names = {param: name for name, param in model.named_parameters()}
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for group in optimizer.param_groups:
        found[group["orthogonalize"]] |= {names[param] for param in group["params"]}
    return found


def test_the_matrices_of_a_gpt_are_those_within_the_blocks() -> None:
    model = GPT(PRESETS["tiny"], seq_len=8)
    inner = {name for name, param in model.named_parameters() if param.dim() == 2 and name.startswith("blocks.")}
    assert len(inner) == 12
    for optimizer in (MuonLikeSM3(model.parameters(), model=model), MuonLikeSM3(model.named_parameters())):
        assert chosen(optimizer, model)[True] == inner
    model.head.weight = nn.Parameter(torch.ones(256, 32))  # no longer tied
    assert chosen(MuonLikeSM3(model.parameters(), model=model), model)[True] == inner


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4)
        self.conv = nn.Conv2d(8, 8, 3)
        self.depthwise = nn.Conv2d(8, 1, 1)
        self.experts = nn.Parameter(torch.ones(4, 8, 8))
        self.scale = nn.Parameter(torch.ones(1, 8))
        self.mixer = nn.ModuleDict({"output": nn.ModuleDict({"dense": nn.Linear(8, 8)})})
        self.head = nn.Linear(8, 5)


def test_convolutions_are_matrices_and_first_and_last_layers_are_none() -> None:
    model = Vision()
    expected = {"conv.weight", "mixer.output.dense.weight"}
    assert chosen(MuonLikeSM3(model.parameters(), model=model), model)[True] == expected


def test_weights_that_are_made_of_others_count_as_those_of_their_module() -> None:
    model = Vision()
    for module in (model.conv, model.mixer["output"]["dense"], model.head):
        weight_norm(module)
    weights = {f"{name}.parametrizations.weight.original1" for name in ("conv", "mixer.output.dense")}
    assert chosen(MuonLikeSM3(model.parameters(), model=model), model)[True] == weights


def test_a_head_that_peft_keeps_a_copy_of_stays_one() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    for kept in ("modules_to_save", "original_module"):
        model.append(nn.ModuleDict({"lm_head": nn.ModuleDict({kept: nn.ModuleDict({"default": nn.Linear(8, 5)})})}))
    assert chosen(MuonLikeSM3(model.parameters(), model=model), model)[True] == {"0.weight"}


def test_names_or_a_model_must_come() -> None:
    with pytest.raises(ValueError, match=r"a parameter of shape \(3, 2\) has no name .* Pass model="):
        MuonLikeSM3([nn.Parameter(torch.ones(3, 2))])
    with pytest.raises(ValueError, match="is no parameter of Linear"):
        MuonLikeSM3([nn.Parameter(torch.ones(3, 2))], model=nn.Linear(2, 2))


def test_names_may_stand_beside_the_parameters_of_a_group() -> None:
    layer = nn.Linear(4, 4)
    given = {"params": [layer.weight, layer.bias], "param_names": ["up.weight", "up.bias"]}
    optimizer = MuonLikeSM3([given])
    assert [(group["orthogonalize"], group["param_names"]) for group in optimizer.param_groups] == [
        (True, ["up.weight"]),
        (False, ["up.bias"]),
    ]
    assert given["param_names"] == ["up.weight", "up.bias"]


def test_param_groups_may_say_it_themselves() -> None:
    first, second, third = (nn.Linear(4, 4) for _ in range(3))
    groups = [
        {"params": first.parameters(), "orthogonalize": False, "lr": 0.5},
        {"params": [second.weight], "orthogonalize": True},
        {"params": list(third.named_parameters()), "weight_decay": 0.1},
    ]
    optimizer = MuonLikeSM3(groups[:2], lr=0.1, momentum=0.8)
    assert [(group["orthogonalize"], group["momentum"]) for group in optimizer.param_groups] == [
        (False, 0.8),
        (True, 0.8),
    ]
    optimizer = MuonLikeSM3(groups[2:], lr=0.1)
    assert [(group["orthogonalize"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (True, 0.1),
        (False, 0.1),
    ]


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ((), ValueError, "empty parameter list"),
        (torch.ones(3, 2), TypeError, "should be an iterable of Tensors or dicts"),
        (["weight"], TypeError, "can only optimize Tensors, but one of the params is str"),
        (nn.ModuleList([nn.Linear(2, 2)]), TypeError, "can only optimize Tensors, but one of the params is .*Linear"),
        ([{"params": {nn.Parameter(torch.ones(2, 2))}}], TypeError, "ordered collections"),
        ([{"params": nn.Linear(2, 2).named_parameters()}, torch.ones(2)], TypeError, "param_group must be a dict"),
        ([{"params": nn.Linear(2, 2).named_parameters(), "lr": -1.0}], ValueError, "lr must be at least 0"),
    ],
)
def test_what_any_optimizer_refuses(params: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MuonLikeSM3(params)


def test_orthogonalize_belongs_into_param_groups_and_a_model_is_a_module() -> None:
    layer = nn.Linear(3, 2)
    for choice in (True, False, ["weight"]):
        with pytest.raises(
            TypeError, match=r"picks the matrices itself, and takes no orthogonalize=.*Say it in a param"
        ):
            MuonLikeSM3(layer.named_parameters(), orthogonalize=choice)
    with pytest.raises(TypeError, match="model= takes the root module, as wrapped, but got a list"):
        MuonLikeSM3(layer.parameters(), model=[layer])  # type: ignore[arg-type]


def test_a_group_that_is_added_becomes_one_of_matrices_and_one_of_the_rest() -> None:
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
    optimizer = MuonLikeSM3(layers[0].parameters(), lr=0.1, model=layers, momentum=0.8)
    optimizer.add_param_group({"params": layers[1].parameters(), "lr": 0.5})
    optimizer.add_param_group({"params": layers[2].parameters(), "orthogonalize": False})
    told = [
        tuple(group[key] for key in ("orthogonalize", "lr", "momentum", "cover_block"))
        for group in optimizer.param_groups
    ]
    first, added = [(True, 0.1, 0.8, None), (False, 0.1, 0.8, 64)], [(True, 0.5, 0.8, None), (False, 0.5, 0.8, 64)]
    assert told == [*first, *added, (False, 0.1, 0.8, 64)]
    with pytest.raises(ValueError, match="lr must be at least 0"):
        optimizer.add_param_group({"params": layers[3].parameters(), "lr": -1.0})
    stranger = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="is no parameter of ModuleList"):
        optimizer.add_param_group({"params": [layers[3].weight, stranger]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [layers[3].weight, layers[0].bias]})  # the matrix alone is no fault
    assert len(optimizer.param_groups) == 5
    model, other = copy.deepcopy((layers, optimizer))
    with pytest.raises(ValueError, match="no parameter of any model"):
        other.add_param_group({"params": model[3].parameters()})
    other.attach(model)
    other.add_param_group({"params": model[3].parameters()})
    assert [group["orthogonalize"] for group in other.param_groups[5:]] == [True, False]
    assert other.param_groups[5]["momentum"] == 0.8


def test_it_is_the_usual_recipe_for_the_rest_and_is_pickled() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 6), "layer": nn.Linear(6, 4)})
    other = copy.deepcopy(model)
    optimizer = MuonLikeSM3(model.parameters(), lr=1e-2, model=model)
    usual = SM3.adamw_like(other.parameters(), lr=1e-2)
    matrices, rest = optimizer.param_groups
    assert {key: matrices[key] for key in ADAMW_LIKE | MATRIX} == ADAMW_LIKE | MATRIX
    assert {key: rest[key] for key in ADAMW_LIKE} == ADAMW_LIKE
    for _ in range(2):
        for net, each in ((model, optimizer), (other, usual)):
            net["layer"](net["embedding"](torch.tensor([1, 3]))).square().sum().backward()
            for param in net.parameters():
                param.grad.clamp_(-1, 1).round_(decimals=1)
            each.step()
            each.zero_grad()
        assert not torch.equal(model["layer"].weight, other["layer"].weight)
        model["layer"].weight.data.copy_(other["layer"].weight)
    assert torch.equal(model["embedding"].weight, other["embedding"].weight)
    assert torch.equal(model["layer"].bias, other["layer"].bias)
    assert type(pickle.loads(pickle.dumps(optimizer))) is MuonLikeSM3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_that_is_told_its_model_rounds_alike(copied: Any) -> None:
    model: nn.Module = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = MuonLikeSM3(model.parameters(), lr=1e-2, model=model, momentum_dtype=torch.int8)
    other, its = copied((model, optimizer))
    its.attach(other)
    for net, each in ((model, optimizer), (other, its)):
        for _ in range(3):
            net(torch.tensor([1, 3])).square().sum().backward()
            each.step()
            each.zero_grad()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def steps_of(name: str, model: nn.Module, optimizer: SM3, steps: range) -> None:
    shapes = {key: weight.shape for key, weight in Model().named_parameters()}
    for step in steps:
        model({key: exact_gradient(step, key, shape) for key, shape in shapes.items()}).backward()
        optimizer.step()
        optimizer.zero_grad(LAYOUTS[name].set_to_none if name else True)


def train(name: str, saved: Any, steps: range) -> tuple[dict[str, Tensor], Any]:
    """Some steps under a wrapper (or none), from a state that another one left; weights and state by name."""
    model: nn.Module = Model()
    if saved is not None:
        model.load_state_dict(saved[0])
    if name:
        model = LAYOUTS[name].wrap(model)  # type: ignore[arg-type]
    optimizer = MuonLikeSM3(model.parameters(), lr=0.1, model=model, cover_block=2)
    if saved is not None:
        set_optimizer_state_dict(model, optimizer, saved[1], options=WHOLE)
    steps_of(name, model, optimizer, steps)
    state = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    weights = LAYOUTS[name].gather(model) if name else {key: w.detach() for key, w in model.named_parameters()}
    return weights, state


def moved(name: str) -> None:
    """From one process to a wrapper with its groups of its own and back, and always one process beside it."""
    alone = train("", None, range(2))
    there = train(name, alone, range(2, 4))
    back = train("", there, range(4, 6))
    expected = train("", train("", alone, range(2, 4)), range(4, 6))
    for key, weight in expected[0].items():
        assert torch.equal(back[0][key], weight), key


@pytest.mark.parametrize("name", ["fsdp1-nested", "fairscale-separate-nested"])
def test_it_trains_and_moves_under_flat_wrappers(workers: Pool, name: str) -> None:
    workers(2).run(moved, name)


def of_a_flat_parameter() -> None:
    model = LAYOUTS["fsdp1-flat-nested"].wrap(Model())
    with pytest.raises(ValueError, match=r"blocks.0.weights.0, a matrix, and blocks.0.weights.1, which is none"):
        MuonLikeSM3(model.parameters(), model=model)
    with pytest.raises(UserError, match=r"--recipe muon-like: blocks.0.weights.0, a matrix, and"):
        sm3_muon_like(model, Settings(lr=0.1))
    optimizer = MuonLikeSM3([{"params": model.parameters(), "orthogonalize": ["blocks.0.weights.0"]}], model=model)
    model({name: torch.ones(weight.shape) for name, weight in Model().named_parameters()}).backward()
    optimizer.step()
    held = [part.entry.shard.name for bucket in optimizer._current_plan().orthogonal.buckets for part in bucket.parts]
    assert held in (["blocks.0.weights.0"], [])  # it lies whole on one of the ranks


def test_a_flat_parameter_of_matrices_and_others(workers: Pool) -> None:
    workers(2).run(of_a_flat_parameter)


def with_oss() -> None:
    from fairscale.optim import OSS

    model, alone = Model(), Model()
    oss = OSS(MuonLikeSM3.groups(model.parameters(), model), optim=MuonLikeSM3, lr=0.1)
    optimizer = MuonLikeSM3(alone.parameters(), lr=0.1, model=alone)
    for step in range(3):
        for net in (model, alone):
            for name, param in net.named_parameters():
                param.grad = exact_gradient(step, name, param.shape)
        oss.step()
        optimizer.step()
    for param, expected in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(param, expected)
    for wrapper, options in (
        (OSS, {"optim": MuonLikeSM3}),
        (ZeroRedundancyOptimizer, {"optimizer_class": MuonLikeSM3}),
    ):
        with pytest.raises(ValueError, match=r"hands learning rates on group by group.* MuonLikeSM3\.groups"):
            wrapper(model.parameters(), lr=0.1, model=model, **options)
        groups = MuonLikeSM3.groups(model.parameters(), model)
        oss = wrapper(groups, lr=0.1, model=model, **options)
        for group in oss.param_groups:
            group["lr"] = 0.0  # as a schedule may
        before = [param.detach().clone() for param in model.parameters()]
        oss.step()
        assert all(map(torch.equal, before, model.parameters()))


def test_within_oss(workers: Pool) -> None:
    workers(2).run(with_oss)
