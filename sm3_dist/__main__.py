"""``python -m sm3_dist plan``: what a model will need on each rank."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import nn

from sm3_dist.planning import WRAPPERS, RankBytes, plan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOMENTUM_DTYPES = {**DTYPES, "int8": torch.int8}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m sm3_dist", description=__doc__)
    command = parser.add_subparsers(required=True).add_parser(
        "plan", help="bytes per rank of a model that trains with SM3; it is built without taking memory"
    )
    command.add_argument(
        "model", metavar="MODULE:CALLABLE", help="what makes the model when called, such as torch.nn:Transformer"
    )
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the weights")
    command.add_argument("--world", type=int, default=1, help="number of ranks")
    command.add_argument("--wrapper", choices=WRAPPERS, default="none", help="how they share the work")
    command.add_argument("--momentum", type=float, default=0.0)
    command.add_argument("--momentum-dtype", choices=MOMENTUM_DTYPES)
    command.add_argument("--update-rms", type=float)
    command.add_argument("--cover-block", type=int)
    given = parser.parse_args(arguments)
    try:
        module = _built(given.model).to(DTYPES[given.dtype])
        ranks = plan(
            module,
            world=given.world,
            wrapper=given.wrapper,
            momentum=given.momentum,
            momentum_dtype=MOMENTUM_DTYPES[given.momentum_dtype] if given.momentum_dtype else None,
            update_rms=given.update_rms,
            cover_block=given.cover_block,
        )
    except (ValueError, ImportError, AttributeError) as error:
        command.error(str(error))
    print(table(ranks, sum(param.numel() for param in module.parameters())))


def _built(name: str) -> nn.Module:
    """The model on the meta device."""
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
        lines.append(f"{name:<14}{max(each):>18,}{sum(each):>20,}{sum(each) / max(1, parameters):>15.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
