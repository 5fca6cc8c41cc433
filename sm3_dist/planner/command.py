"""``python -m sm3_dist plan``: what a model will need on each rank."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sm3_dist.planner.collective_volume import SENT, ring
from sm3_dist.planner.decoder import MODELS, Decoder, of_size, read_config
from sm3_dist.planner.other_optimizers import RIVALS, rival
from sm3_dist.planner.planning import IN_BACKWARD, RankBytes, plan
from sm3_dist.planner.rank_shards import WRAPPERS
from sm3_dist.step.param_groups import ADAMW_LIKE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOMENTUM_DTYPES = {**DTYPES, "int8": torch.int8}


@dataclass(frozen=True)
class Variant:
    """A way to use SM3.

    Args:
        dtype: type of the weights.
        options: options of :class:`sm3_dist.SM3` on which the bytes depend.
        in_backward: whether steps are taken during backward, where the wrapper allows it.
    """

    dtype: torch.dtype
    options: dict[str, Any]
    in_backward: bool = False


@dataclass(frozen=True)
class Row:
    """What each rank holds with one optimizer.

    Args:
        name: of the optimizer.
        ranks: the bytes of each rank.
        weights: bytes of all weights.
        trained: of those that are trained.
    """

    name: str
    ranks: Sequence[RankBytes]
    weights: int
    trained: int


MOMENTUM = {"momentum": 0.9}
VARIANTS = {
    "sm3-bf16": Variant(torch.bfloat16, {}, in_backward=True),
    "sm3-bf16-momentum8": Variant(torch.bfloat16, {**MOMENTUM, "momentum_dtype": torch.int8}, in_backward=True),
    "sm3-bf16-momentum16": Variant(torch.bfloat16, {**MOMENTUM, "momentum_dtype": torch.bfloat16}, in_backward=True),
    "sm3": Variant(torch.float32, {}),
    "sm3-momentum": Variant(torch.float32, MOMENTUM),
    "sm3-adamw-like": Variant(torch.float32, {k: ADAMW_LIKE[k] for k in ("momentum", "update_rms", "cover_block")}),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m sm3_dist", description=__doc__)
    command = parser.add_subparsers(required=True).add_parser(
        "plan", help="bytes per rank of a model that trains with SM3; it is built without taking memory"
    )
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "module",
        nargs="?",
        metavar="MODULE:CALLABLE",
        help="what makes the model when called, such as torch.nn:Transformer",
    )
    what.add_argument("--model", choices=MODELS, help="a well-known model")
    what.add_argument("--params", type=float, metavar="N", help="a Llama of about so many parameters, such as 7e9")
    what.add_argument("--config", type=Path, metavar="FILE", help="config.json of a decoder on Hugging Face")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the weights")
    command.add_argument("--world", type=int, default=1, help="number of ranks")
    command.add_argument("--wrapper", choices=WRAPPERS, default="none", help="how they share the work")
    command.add_argument("--replicas", type=int, default=2, help="hsdp: copies of the model (default: 2)")
    command.add_argument(
        "--unit", metavar="CLASS", help="class of the submodules that are wrapped one by one (decoders: their blocks)"
    )
    command.add_argument("--shard-covers", action="store_true")
    command.add_argument("--step-in-backward", action="store_true")
    command.add_argument("--momentum", type=float, default=0.0)
    command.add_argument("--momentum-dtype", choices=MOMENTUM_DTYPES)
    command.add_argument("--update-rms", type=float)
    command.add_argument("--cover-block", type=int)
    command.add_argument(
        "--optimizer",
        nargs="+",
        choices=[*VARIANTS, *RIVALS],
        default=[*VARIANTS, *RIVALS],
        metavar="NAME",
        help=f"what to compare with: {', '.join([*VARIANTS, *RIVALS])} (default: all)",
    )
    given = parser.parse_args(arguments)
    try:
        module = _model(given)
        shared = {"world": given.world, "wrapper": given.wrapper, "replicas": given.replicas}
        shared |= {"units": _units(module, given.unit)}
        shared |= {"tensor_parallel": getattr(module, "tensor_parallel", None) if given.wrapper == "tp" else None}
        ranks = plan(
            module.to(DTYPES[given.dtype]),
            **shared,
            shard_covers=given.shard_covers,
            step_in_backward=given.step_in_backward,
            momentum=given.momentum,
            momentum_dtype=MOMENTUM_DTYPES[given.momentum_dtype] if given.momentum_dtype else None,
            update_rms=given.update_rms,
            cover_block=given.cover_block,
        )
        parameters = sum(param.numel() for param in module.parameters())
        print(table(ranks, parameters))
        print()
        rows = [_row(name, module, shared, given.shard_covers) for name in given.optimizer]
        print(comparison(rows, given.wrapper, given.replicas))
    except (ValueError, ImportError, AttributeError) as error:
        command.error(str(error))


def _model(given: argparse.Namespace) -> nn.Module:
    """The model that the command line names, on the meta device."""
    if given.module is not None:
        return _built(given.module)
    if given.model is not None:
        config = MODELS[given.model]
    elif given.config is not None:
        config = read_config(given.config)
    else:
        config = of_size(given.params)
    with torch.device("meta"):
        return Decoder(config)


def _built(name: str) -> nn.Module:
    """What a callable makes."""
    path, _, attribute = name.partition(":")
    if not path or not attribute:
        raise ValueError(f"the model must be named as MODULE:CALLABLE, but is {name!r}")
    sys.path.insert(0, "")  # as ``python -m`` has it: modules of the directory that it is called in
    make = getattr(importlib.import_module(path), attribute)
    with torch.device("meta"):
        module = make()
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name} makes a {type(module).__name__}, not a torch.nn.Module")
    return module


def _units(module: nn.Module, name: str | None) -> list[nn.Module]:
    """The submodules that are wrapped one by one."""
    if name is None:
        return list(module.blocks) if isinstance(module, Decoder) else []
    found = [each for each in module.modules() if type(each).__name__ == name]
    if not found:
        classes = ", ".join(sorted({type(each).__name__ for each in module.modules()}))
        raise ValueError(f"the model has no submodule of class {name}; it has {classes}")
    return found


def _row(name: str, module: nn.Module, shared: dict[str, Any], shard_covers: bool) -> Row:
    """What each rank holds with one of the optimizers that are compared."""
    if name in RIVALS:
        module = module.to(torch.float32)
        ranks = rival(name, module, **shared)
    else:
        variant = VARIANTS[name]
        module = module.to(variant.dtype)
        in_backward = variant.in_backward and shared["wrapper"] in IN_BACKWARD and not shard_covers
        options = {**variant.options, "shard_covers": shard_covers, "step_in_backward": in_backward}
        ranks = plan(module, **shared, **options)
    params = list(module.parameters())
    weights = sum(param.numel() * param.element_size() for param in params)
    trained = sum(param.numel() * param.element_size() for param in params if param.requires_grad)
    return Row(name, ranks, weights, trained)


def table(ranks: Sequence[RankBytes], parameters: int) -> str:
    """The bytes of the rank that holds most, of all ranks together, and of these per parameter.

    Example:
        >>> print(table([RankBytes(40, 40, 8, 0, 80), RankBytes(40, 40, 12, 0, 80)], 20))
        20 parameters, 2 ranks
        bytes               largest rank           all ranks  per parameter
        weights                       40                  80           4.00
        gradients                     40                  80           4.00
        state                         12                  20           1.00
        sent                           0                   0           0.00
        adam_moments                  80                 160           8.00
    """
    lines = [f"{parameters:,} parameters, {len(ranks)} rank{'s' * (len(ranks) > 1)}"]
    lines.append(f"{'bytes':<14}{'largest rank':>18}{'all ranks':>20}{'per parameter':>15}")
    for name in (field.name for field in fields(RankBytes)):
        each = [getattr(rank, name) for rank in ranks]
        if name == "exchanged" and not any(each):  # without orthogonal updates
            continue
        lines.append(f"{name:<14}{max(each):>18,}{sum(each):>20,}{sum(each) / max(1, parameters):>15.2f}")
    return "\n".join(lines)


def comparison(rows: Sequence[Row], wrapper: str, replicas: int) -> str:
    """What the rank that holds most needs with each optimizer, and what it sends in a step.

    Example:
        >>> print(comparison([Row("sm3", [RankBytes(4096, 4096, 96, 64, 0)] * 2, 4096, 4096)], "ddp", 1))
        on the rank that holds most   weights   gradients       state    together   sent: model   sent: state
        sm3                           4.10 kB     4.10 kB        96 B     8.29 kB       4.10 kB          64 B
    """
    heads = ("weights", "gradients", "state", "together", "sent: model", "sent: state")
    widths = (9, 12, 12, 12, 14, 14)
    lines = [_line("on the rank that holds most", heads, widths)]
    for row in rows:
        most = max(row.ranks, key=lambda each: each.weights + each.gradients + each.state)
        held = (most.weights, most.gradients, most.state)
        world, formula = len(row.ranks), SENT[wrapper]
        model = size(formula(row.weights, row.trained, world, replicas)) if formula else "activations"
        group = world // replicas if wrapper == "hsdp" else world
        cells = [*map(size, held), size(sum(held)), model, size(2 * ring(group) * most.sent)]
        lines.append(_line(row.name, cells, widths))
    return "\n".join(lines)


def _line(first: str, cells: Sequence[str], widths: Sequence[int]) -> str:
    return f"{first:<28}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def size(count: float) -> str:
    """Write a number of bytes for people.

    Example:
        >>> size(980), size(3_370_000), size(2.5e9)
        ('980 B', '3.37 MB', '2.50 GB')
    """
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"
