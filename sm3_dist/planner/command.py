"""``sm3_dist plan``, or ``python -m sm3_dist plan``: what a model will need on each rank."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from sm3_dist.planner.decoder import MODELS, Decoder, of_size, read_config
from sm3_dist.planner.other_optimizers import BASELINES, baseline
from sm3_dist.planner.planning import IN_BACKWARD, plan, plan_muon_like
from sm3_dist.planner.sharding import WRAPPERS, Sharding
from sm3_dist.planner.step_temporaries import step_temporaries
from sm3_dist.planner.tables import Row, comparison, table
from sm3_dist.step.param_groups import ADAMW_LIKE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOMENTUM_DTYPES = {**DTYPES, "int8": torch.int8}
_PATIENCE = 2.0
_FLOAT = 4


@dataclass(frozen=True)
class Variant:
    """A way to use SM3.

    Args:
        dtype: type of the weights.
        options: options of :class:`sm3_dist.SM3` on which the bytes depend.
        in_backward: whether steps are taken during backward, where the wrapper allows it.
    """

    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    in_backward: bool = False


MOMENTUM = {"momentum": 0.9}
VARIANTS = {
    "sm3-bf16": Variant(torch.bfloat16, {}, in_backward=True),
    "sm3-bf16-momentum8": Variant(torch.bfloat16, {**MOMENTUM, "momentum_dtype": torch.int8}, in_backward=True),
    "sm3-bf16-momentum16": Variant(torch.bfloat16, {**MOMENTUM, "momentum_dtype": torch.bfloat16}, in_backward=True),
    "sm3": Variant(torch.float32, {}),
    "sm3-momentum": Variant(torch.float32, MOMENTUM),
    "sm3-adamw-like": Variant(torch.float32, {k: ADAMW_LIKE[k] for k in ("momentum", "update_rms", "cover_block")}),
}

MUON_LIKE = "sm3-muon-like"


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Leave with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None, version: str = "") -> None:
    """Run the command line.

    Args:
        arguments: those of the command line; ``None`` for those of this process.
        version: what ``--version`` says.
    """
    parser, command = parsers(version)
    given = parser.parse_args(arguments)
    try:
        run(given)
    except BrokenPipeError:  # whoever reads has enough: what is left in the buffer is not written at the end either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, ImportError, AttributeError) as error:
        command.error(str(error))


def parsers(version: str) -> tuple[Parser, Parser]:
    """That of the program and that of its command."""
    prog = "sm3_dist" if Path(sys.argv[0]).name == "sm3_dist" else "python -m sm3_dist"
    parser = Parser(prog=prog, description="SM3 for sharded training.")
    parser.add_argument("--version", action="version", version=f"sm3_dist {version}")
    about = (
        "bytes per rank of a model that trains with SM3, and with other optimizers; it is built without taking memory"
    )
    command = parser.add_subparsers(required=True, metavar="plan").add_parser("plan", help=about, description=about)
    model = command.add_argument_group("the model, one of")
    what = model.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "module",
        nargs="?",
        metavar="MODULE:CALLABLE",
        help="what makes the model when called without arguments, such as torch.nn:Transformer",
    )
    what.add_argument("--model", choices=MODELS, metavar="NAME", help=f"a well-known model: {', '.join(MODELS)}")
    what.add_argument(
        "--params", type=number, metavar="N", help="a Llama of about so many parameters, such as 7B or 7e9"
    )
    what.add_argument("--config", type=Path, metavar="FILE", help="config.json of a decoder on Hugging Face")
    ranks = command.add_argument_group("the ranks")
    ranks.add_argument("--world", type=int, default=1, metavar="N", help="number of ranks (default: 1)")
    ranks.add_argument(
        "--wrapper",
        choices=WRAPPERS,
        default="none",
        help=f"how they share the work: {', '.join(WRAPPERS)} (default: none)",
        metavar="NAME",
    )
    ranks.add_argument("--replicas", type=int, default=2, metavar="N", help="hsdp: copies of the model (default: 2)")
    ranks.add_argument(
        "--tp-size", type=int, metavar="N", help="fsdp2, hsdp: tensor parallel over so many ranks (decoders)"
    )
    ranks.add_argument(
        "--unit", metavar="CLASS", help="class of the submodules that are wrapped one by one (decoders: their blocks)"
    )
    sm3 = command.add_argument_group("options of SM3, for the upper table")
    sm3.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the weights (default: float32)")
    sm3.add_argument("--momentum", type=float, default=0.0, metavar="M", help="at least 0 and less than 1 (default: 0)")
    sm3.add_argument("--momentum-dtype", choices=MOMENTUM_DTYPES, help="type of the momentum (default: float32)")
    sm3.add_argument("--update-rms", type=float, metavar="RMS", help="as the argument of SM3")
    sm3.add_argument("--cover-block", type=int, metavar="B", help="as the argument of SM3; the recipe has 64")
    sm3.add_argument(
        "--shard-covers", action="store_true", help="each accumulator entry on one rank alone between steps"
    )
    sm3.add_argument(
        "--step-in-backward", action="store_true", help="no gradients are kept (sm3_dist.step_in_backward)"
    )
    names = [*VARIANTS, MUON_LIKE, *BASELINES]
    command.add_argument(
        "--optimizer",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"rows of the lower table: {', '.join(names)} (default: all)",
    )
    command.epilog = (
        "together: weights, gradients and state between two steps. step, GPU: the most that a step takes besides and "
        "frees again, by formula; ours nothing but for orthogonal updates, AdamW, as PyTorch makes it by default, a "
        "copy of what it steps, and nothing with fused=True. Activations and weights that wrappers gather are not "
        "counted. docs/planning.md has the formulas."
    )
    return parser, command


def number(text: str) -> float:
    """A number of parameters, such as ``7B``, ``124M`` or ``7e9``.

    Raises:
        argparse.ArgumentTypeError: it is none.

    Example:
        >>> number("7B"), number("1.3b"), number("124M"), number("7e9")
        (7000000000.0, 1300000000.0, 124000000.0, 7000000000.0)
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e\+?[0-9]+)?)\s*([kmbt]?)\s*", text.lower())
    try:
        return float(found[1]) * {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[found[2]] if found else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of parameters, such as 7B, 124M or 7e9") from None


def run(given: argparse.Namespace) -> None:
    """Print what is asked for.

    Raises:
        ValueError, ImportError, AttributeError: says what is wrong with it.
    """
    module = _model(given)
    shared = {"world": given.world, "wrapper": given.wrapper, "replicas": given.replicas, "tp_size": given.tp_size}
    shared |= {"units": _units(module, given.unit)}
    cut = given.wrapper == "tp" or given.tp_size is not None
    if cut and not hasattr(module, "tensor_parallel"):
        raise ValueError(
            "tensor parallelism is planned for --model, --params and --config; in Python plan() takes others"
        )
    shared |= {"tensor_parallel": module.tensor_parallel if cut else None}
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
    print(table(ranks, sum(param.numel() for param in module.parameters())), end="\n\n", flush=True)
    sharding = Sharding.of(module, **shared)
    takes = step_temporaries(sharding)
    rows = [_row(name, sharding, shared, given.shard_covers, takes.get(name, 0)) for name in _shown(given.optimizer)]
    print(comparison(rows, given.wrapper, given.replicas, sharding.mesh[1]))


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
    make: Callable[[], Any] = getattr(importlib.import_module(path), attribute)
    try:
        with torch.device("meta"):
            module = make()
    except Exception as error:
        raise ValueError(
            f"{name} is called without arguments, and raised {type(error).__name__}: {error}. Write a function that "
            "takes none and returns the model, and name that"
        ) from error
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


def _shown(names: Sequence[str]) -> Iterator[str]:
    """Say on a terminal how far it is, once it has taken some time."""
    start, shown = time.monotonic(), False
    for number, name in enumerate(names):
        if sys.stderr.isatty() and time.monotonic() - start > _PATIENCE:
            print(f"\r{number} of {len(names)} optimizers", end="", file=sys.stderr, flush=True)
            shown = True
        yield name
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _row(name: str, sharding: Sharding, shared: dict[str, Any], shard_covers: bool, step: int) -> Row:
    """What each rank holds with one of the optimizers that are compared; of ``shared`` the sharding was made."""
    module = sharding.module
    if name in BASELINES:
        size, ranks = BASELINES[name].weight, baseline(name, sharding)
    elif name == MUON_LIKE:
        module.to(torch.float32)
        size, ranks = _FLOAT, plan_muon_like(sharding, shard_covers=shard_covers)
    else:
        variant = VARIANTS[name]
        module.to(variant.dtype)
        in_backward = variant.in_backward and sharding.wrapper in IN_BACKWARD and not shard_covers
        options = {**variant.options, "shard_covers": shard_covers, "step_in_backward": in_backward}
        size, ranks = variant.dtype.itemsize, plan(module, **shared, **options)
    weights, trained = _largest_part(sharding)
    return Row(name, ranks, size * weights, size * trained, step)


def _largest_part(sharding: Sharding) -> tuple[int, int]:
    """Elements that tensor parallelism leaves the rank that has most of them, all and those that are trained."""
    weights = trained = 0
    for name, param in sharding.module.named_parameters():
        axis = sharding.tensor_parallel.get(name)
        n = param.numel()
        if axis is not None:
            n = n // max(1, param.shape[axis]) * -(-param.shape[axis] // sharding.mesh[1])
        weights += n
        trained += n if param.requires_grad else 0
    return weights, trained
