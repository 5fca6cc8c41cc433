"""What the training job is made of: the model, the options, the recipes."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import pkgutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import launch
from launch.job import peers
from launch.job.command_line import parse
from launch.job.model import GPT, PRESETS
from launch.job.options import Options
from launch.job.parallel import PARALLEL
from launch.job.recipe import RECIPES, adamw_bytes, build, chosen, schedule, settings, state_bytes, title
from launch.job.world import UserError


def test_gpt2_has_the_size_of_gpt2() -> None:
    assert PRESETS["gpt2"].count(seq_len=1024) == 124_439_808


def test_the_model_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    model = GPT(PRESETS["tiny"], seq_len=16)
    text = torch.randint(256, (2, 16))
    changed = text.clone()
    changed[:, 10] = (text[:, 10] + 1) % 256
    before, after = model(text), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert (before[:, 10:] != after[:, 10:]).any(-1).all()


def test_it_starts_without_knowing_anything() -> None:
    torch.manual_seed(0)
    model = GPT(PRESETS["small"], seq_len=16)
    inputs = torch.randint(256, (4, 16))
    loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), torch.randint(256, (64,)))
    assert loss.item() == pytest.approx(math.log(256), abs=0.2)


def test_options_become_json() -> None:
    options = parse(["--data", "some/text", "--beta", "0"])
    assert Options(**{**json.loads(json.dumps(options.as_json())), "data": Path("some/text")}) == options


@pytest.mark.parametrize("module", [info.name for info in pkgutil.walk_packages(launch.__path__, "launch.")])
def test_examples_in_the_documentation_of(module: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(module))
    assert failed == 0


def test_recipes_differ_and_are_for_sm3_alone() -> None:
    like, paper = (chosen(parse(["--recipe", name])) for name in ("adamw-like", "paper"))
    assert like != paper
    with pytest.raises(UserError, match="--recipe paper is a way to use SM3"):
        chosen(parse(["--recipe", "paper", "--optimizer", "adamw"]))


FLATTENED = ("fsdp1-flat", "fairscale")


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        ("", "muon-like"),
        *((f"--parallel {each}", "adamw-like" if each in FLATTENED else "muon-like") for each in PARALLEL),
        ("--step-in-backward", "adamw-like"),
        ("--parallel fsdp1-flat --recipe muon-like", "muon-like"),  # a refusal, later
        ("--recipe adamw-like", "adamw-like"),
    ],
)
def test_matrices_are_made_orthogonal_wherever_they_can_be(arguments: str, recipe: str) -> None:
    options = parse(arguments.split())
    assert chosen(options) is RECIPES[recipe]
    assert settings(options) == RECIPES[recipe].best
    assert title(options) == f"sm3 ({recipe})"


@pytest.mark.parametrize(
    ("given", "momenta"),
    [("", (0.95, 0.9)), *((f"--momentum {m}", (m, 0.9)) for m in (0.95, 0.9, 0.8, 0.0))],
)
def test_momentum_is_that_of_the_matrices_alone(given: str, momenta: tuple[float, float]) -> None:
    options = parse(["--model", "tiny", *given.split()])
    matrices, rest = build(GPT(PRESETS["tiny"], 16), settings(options), options).param_groups
    assert (matrices["orthogonalize"], rest["orthogonalize"]) == (True, False)
    assert (matrices["momentum"], rest["momentum"]) == momenta
    assert (matrices["nesterov"], rest["nesterov"]) == (momenta[0] > 0, True)


def test_products_of_a_peer_are_made_in_the_type_that_the_processor_is_quick_at() -> None:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = x.float() @ x.float().T
    added = torch.addmm(wide.bfloat16().float(), wide.bfloat16().float(), wide.bfloat16().float(), beta=-4, alpha=2)
    with patch.object(peers, "product_type", return_value=torch.float32), peers.WideProducts():
        gram = x @ x.T
        result = torch.addmm(gram, gram, gram, beta=-4, alpha=2)
        assert (x * 2).dtype == torch.bfloat16
    assert torch.equal(gram, wide.bfloat16())
    assert torch.equal(result, added.bfloat16())


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("adamw-8bit", "torchao"),
        ("adafactor-transformers", "transformers"),
        ("came", "came_pytorch"),
        ("lion", "lion_pytorch"),
        ("muon", "torch"),
        ("nadamw", "torch"),
        ("normuon", "pytorch_optimizer"),
    ],
)
def test_peers_take_steps(name: str, package: str) -> None:
    pytest.importorskip(package, reason="pip install 'sm3_dist[compare]'")
    options = parse(["--optimizer", name, "--model", "tiny"])
    model = GPT(PRESETS["tiny"], 16)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build(model, settings(options), options)
    scheduler = schedule(optimizer, options)
    for _ in range(2):
        model(torch.zeros(2, 16, dtype=torch.long)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True) if p.dim() == 2)
    assert state_bytes(optimizer) > 0
    if name == "adamw-8bit":  # tensors of fewer than 4096 elements have float32
        assert state_bytes(optimizer) < 0.9 * adamw_bytes(optimizer)
    assert scheduler.get_last_lr()[0] != settings(options).lr  # the schedule reaches it
