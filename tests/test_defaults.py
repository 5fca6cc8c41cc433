"""A default device or a default dtype that the user set changes nothing: every tensor names its own."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Pool
from layouts import LAYOUTS, Tensors, full, give
from torch import Tensor, nn

import sm3_dist
from sm3_dist import SM3
from sm3_dist.checkpoint import StateDictOptions, from_adamw, get_optimizer_state_dict, set_optimizer_state_dict

FACTORIES = {"empty", "zeros", "ones", "full", "tensor", "as_tensor", "asarray", "scalar_tensor", "arange", "linspace"}
FACTORIES |= {"empty_strided", "empty_permuted", "eye", "rand", "randn", "randint", "randperm", "sparse_coo_tensor"}
NARROW: dict[str, Any] = {"momentum_dtype": torch.int8, "stochastic_rounding": True}


def test_every_tensor_that_the_package_makes_names_its_device_and_type() -> None:
    """(``torch.from_numpy`` and the like take no device; ``new_zeros`` and ``zeros_like`` have those of a tensor.)"""
    found = 0
    for path in Path(sm3_dist.__file__).parent.rglob("*.py"):
        if path.name.startswith("decoder"):  # models, which their caller makes on the meta device
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("torch.") in FACTORIES:
                if not ast.unparse(node.func).startswith("torch."):
                    continue
                named = {keyword.arg for keyword in node.keywords}
                assert {"device", "dtype"} <= named, f"{path.name}:{node.lineno}: {ast.unparse(node)}"
                found += 1
    assert found > 20


def trained(default: str, layout: str = "whole", **options: Any) -> list[Tensor]:
    """Weights and state of some steps, a save, a load and more steps, all but the model made under the default."""
    bfloat16 = options.get("stochastic_rounding")
    models = [LAYOUTS[layout].wrap(Tensors(dtype=torch.bfloat16 if bfloat16 else torch.float32)) for _ in range(2)]
    saved: dict[str, Any] = {}
    for model in models:
        grads = [
            torch.randn(p.shape, generator=torch.Generator().manual_seed(7)).to(p.dtype) for p in model.parameters()
        ]
        before = torch.get_default_dtype()
        context = torch.device("meta") if default == "meta" else torch.device("cpu")
        if default not in ("meta", "cpu"):
            torch.set_default_dtype(getattr(torch, default))
        try:
            for param, grad in zip(model.parameters(), grads, strict=True):
                give(param, grad)
            with context:
                optimizer = SM3.adamw_like(model.named_parameters(), **options)
                if saved:
                    set_optimizer_state_dict(model, optimizer, saved, options=StateDictOptions(full_state_dict=True))
                for _ in range(2):
                    optimizer.step()
                # What PyTorch itself makes whole ones of is made under the default too.
                whole = StateDictOptions(full_state_dict=default != "meta" or layout == "whole")
                saved = get_optimizer_state_dict(model, optimizer, options=whole)
        finally:
            torch.set_default_dtype(before)
    return [full(p) for p in model.parameters()] + [
        full(value) for param in model.parameters() for value in optimizer.state[param].values()
    ]


@pytest.mark.parametrize("default", ["meta", "float64", "float16"])
@pytest.mark.parametrize("options", [{}, {"backend": "eager"}, NARROW, NARROW | {"backend": "eager"}])
def test_defaults_change_no_bit(default: str, options: dict[str, Any]) -> None:
    expected, found = trained("cpu", **options), trained(default, **options)
    assert len(found) == len(expected) > 20
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(expected, found, strict=True))


def compare_sharded() -> None:
    expected = trained("cpu", "fsdp2", cover_block=2)
    for default in ("float64", "float16", "meta"):
        found = trained(default, "fsdp2", cover_block=2)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(expected, found, strict=True)), default


def test_defaults_change_no_bit_of_shards(workers: Pool) -> None:
    workers(2).run(compare_sharded)


def test_other_optimizers_states_under_another_default() -> None:
    layer = nn.Linear(2, 3)
    adamw = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    adamw.step()
    torch_sm3 = {"step": 3, "accumulator_0": torch.ones(3, 1), "accumulator_1": torch.ones(1, 2)}
    with torch.device("meta"):
        optimizer = SM3(layer.parameters())
        converted = from_adamw(adamw.state_dict(), ["weight", "bias"])
        set_optimizer_state_dict(layer, optimizer, converted, options=StateDictOptions(full_state_dict=True))
        optimizer.step()
        other = SM3([layer.weight])
        other.load_state_dict({"state": {0: torch_sm3}, "param_groups": other.state_dict()["param_groups"]})
        other.step()
    assert optimizer.state[layer.weight]["step"].item() == 2.0
    assert other.state[layer.weight]["step"].item() == 4.0
