"""The recipe: which optimizer, with which settings, at which learning rate when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adafactor, AdamW, NAdam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from launch.job import packages, peers
from launch.job.options import Options
from launch.job.parallel import FLATTENED
from launch.job.settings import Settings
from launch.job.world import UserError
from sm3_dist import SM3, MuonLikeSM3, step_in_backward
from sm3_dist.layout.flat_metadata import is_flattened
from sm3_dist.schedule import CosineSchedule, PaperSchedule
from sm3_dist.step.param_groups import ADAMW_LIKE, MATRIX

SCHEDULES: dict[str, Callable[[int], Callable[[int], float]]] = {"paper": PaperSchedule, "cosine": CosineSchedule}

SETTABLE = ("momentum", "beta", "cover_block")  # what a command line may change of the recipe
SM3_ALONE = ("cover_block", "momentum_dtype", "rounding")  # settings that no other optimizer has


def sm3_adamw_like(model: nn.Module, s: Settings, **sharding: Any) -> Optimizer:
    return SM3.adamw_like(model.named_parameters(), s.lr, model=model, **sm3_options(s), **sharding)


def sm3_muon_like(model: nn.Module, s: Settings, **sharding: Any) -> Optimizer:
    options = sm3_options(s)
    own = {"momentum": options.pop("momentum"), "nesterov": s.momentum > 0}  # the rest keeps the recipe's
    try:
        groups = MuonLikeSM3.groups(model.named_parameters(), model)
        groups = [group | own if group["orthogonalize"] is True else group for group in groups]
        return MuonLikeSM3(groups, s.lr, model=model, **options, **sharding)
    except ValueError as error:  # matrices and others were flattened into one parameter
        raise UserError(f"--recipe muon-like: {error}") from error


def muon_like_groups(model: nn.Module) -> list[dict[str, Any]]:
    return MuonLikeSM3.groups(model.parameters(), model)


def sm3_paper(model: nn.Module, s: Settings, **sharding: Any) -> Optimizer:
    return SM3(model.named_parameters(), s.lr, model=model, **sm3_options(s), **sharding)


def sm3_options(s: Settings) -> dict[str, Any]:
    options = {name: getattr(s, name) for name in ("momentum", "beta", "weight_decay", "cover_block")}
    dtype = getattr(torch, s.momentum_dtype) if s.momentum_dtype else None
    return options | {"momentum_dtype": dtype, "stochastic_rounding": s.rounding != "nearest"}


def adamw(model: nn.Module, s: Settings) -> Optimizer:
    return AdamW(model.named_parameters(), s.lr, (s.momentum, s.beta), weight_decay=s.weight_decay, fused=True)


def nadamw(model: nn.Module, s: Settings) -> Optimizer:
    """AdamW that looks ahead. Momentum starts at half and nears the whole in 100 steps, by default in 10,000."""
    return NAdam(
        model.named_parameters(),
        s.lr,
        (s.momentum, s.beta),
        weight_decay=s.weight_decay,
        decoupled_weight_decay=True,
        momentum_decay=1.0,
    )


def adafactor(model: nn.Module, s: Settings) -> Optimizer:
    return Adafactor(model.named_parameters(), s.lr, weight_decay=s.weight_decay)


def sgd(model: nn.Module, s: Settings) -> Optimizer:
    fused = not is_sharded(model)  # torch has no fused SGD for DTensor
    return SGD(model.named_parameters(), s.lr, s.momentum, weight_decay=s.weight_decay, fused=fused)


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) or is_flattened(parameter) for parameter in model.parameters())


class Owned(nn.Module):
    """The parameters that OSS gave this rank, with what it knows of them, in the form of a model."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__()
        self.groups = groups

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        return self.groups if recurse else ()  # and none is a module's own

    def parameters(self, recurse: bool = True) -> Any:
        return (parameter for group in self.groups for parameter in group["params"])


@dataclass(frozen=True)
class Recipe:
    """An optimizer and how to use it.

    Args:
        make: makes it, of the wrapped model and the settings; for SM3 also of ``shard_over``.
        best: the settings that were found best on the default job.
        unknown: settings that this optimizer does not have.
        whole: whether it takes whole tensors alone.
        moments: how many values it keeps for each element of a weight, in the type of the weight. Of SM3's momentum
            the type is an option.
        groups: param groups of a model, for an OSS, which hands each rank its part of them.
    """

    make: Callable[..., Optimizer]
    best: Settings
    unknown: tuple[str, ...] = SM3_ALONE
    whole: bool = False
    moments: float = 1
    groups: Callable[[nn.Module], Any] = nn.Module.parameters


# One entry for each choice of --recipe, which is for SM3.
RECIPES = {
    "adamw-like": Recipe(sm3_adamw_like, Settings(2e-3, **{k: ADAMW_LIKE[k] for k in SETTABLE}), unknown=()),
    "muon-like": Recipe(
        sm3_muon_like,
        Settings(4e-3, **{k: ADAMW_LIKE[k] for k in SETTABLE} | {"momentum": MATRIX["momentum"]}),
        unknown=(),
        groups=muon_like_groups,
    ),
    "paper": Recipe(sm3_paper, Settings(lr=5e-3, momentum=0.9, beta=0.0), unknown=()),
}

# One entry for each choice of --optimizer but sm3, which has a recipe.
OPTIMIZERS = {
    "adamw": Recipe(adamw, Settings(lr=2e-3, momentum=0.9, beta=0.95), moments=2),
    "nadamw": Recipe(nadamw, Settings(lr=2e-3, momentum=0.9, beta=0.95), moments=2),
    "adamw-8bit": Recipe(peers.adamw_8bit, Settings(lr=2e-3, momentum=0.9, beta=0.95), whole=True, moments=0.5),
    "adafactor": Recipe(adafactor, Settings(lr=3e-2), unknown=("momentum", "beta", *SM3_ALONE), whole=True, moments=0),
    "adafactor-transformers": Recipe(
        peers.adafactor_transformers, Settings(lr=1e-2), unknown=("momentum", "beta", *SM3_ALONE), whole=True, moments=0
    ),
    "came": Recipe(peers.came, Settings(lr=1e-3, momentum=0.9, beta=0.999), whole=True),
    "lion": Recipe(peers.lion, Settings(lr=5e-4, momentum=0.9, beta=0.99), whole=True),
    "muon": Recipe(peers.muon, Settings(lr=4e-3, momentum=0.95, beta=0.95), whole=True),
    "normuon": Recipe(peers.normuon, Settings(lr=4e-3, momentum=0.95, beta=0.95), whole=True),
    "sgd": Recipe(sgd, Settings(lr=0.1, momentum=0.9), unknown=("beta", *SM3_ALONE)),
}


def which(options: Options) -> str | None:
    """Which of :data:`RECIPES` is used, ``None`` for another optimizer: the one of ``--recipe``, if there is any.

    Without it that is muon-like, which trains far better than the others, wherever it can be. It cannot be, and
    adamw-like is used,

    - with ``--parallel fsdp1-flat`` and ``fairscale``, which flatten matrices and others into one parameter: that has
      one set of options, and the two need different ones;
    - with ``--step-in-backward``, where each parameter is stepped as soon as its gradient is there: a matrix is made
      orthogonal as a whole, for which ranks would have to exchange its parts in the midst of backward.

    Raises:
        UserError: there are no recipes for that optimizer.

    Example:
        >>> which(Options()), which(Options(parallel="fairscale")), which(Options(optimizer="adamw"))
        ('muon-like', 'adamw-like', None)
    """
    if options.optimizer != "sm3":
        if options.recipe is not None:
            raise UserError(f"--recipe {options.recipe} is a way to use SM3, and --optimizer is {options.optimizer}")
        return None
    if options.recipe is not None:
        return options.recipe
    return "adamw-like" if options.parallel in FLATTENED or options.step_in_backward else "muon-like"


def title(options: Options) -> str:
    """What users are told of it.

    Example:
        >>> title(Options()), title(Options(optimizer="adamw"))
        ('sm3 (muon-like)', 'adamw')
    """
    recipe = which(options)
    return options.optimizer if recipe is None else f"{options.optimizer} ({recipe})"


def chosen(options: Options) -> Recipe:
    """What ``--optimizer`` and ``--recipe`` ask for.

    Raises:
        UserError: there are no recipes for that optimizer.
    """
    recipe = which(options)
    return OPTIMIZERS[options.optimizer] if recipe is None else RECIPES[recipe]


def settings(options: Options) -> Settings:
    """Return the settings of the chosen optimizer: the best known, and over them what the command line says.

    Raises:
        UserError: the optimizer has no such setting, or the value is out of range.
    """
    recipe = chosen(options)
    given = {item.name: getattr(options, item.name) for item in fields(Settings)}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        limit = 1.0 if name in ("momentum", "beta") else float("inf")
        if name in recipe.unknown:
            raise UserError(f"--optimizer {options.optimizer} has no {name}; leave --{name.replace('_', '-')} out")
        if not isinstance(value, str) and not 0 <= value < limit:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 0 and less than {limit}")
    return replace(recipe.best, **given)


def build(
    model: nn.Module,
    settings: Settings,
    options: Options,
    shard_over: ProcessGroup | None = None,
    oss: bool = False,
) -> Optimizer:
    """Make the chosen optimizer for ``model``, the wrapped one.

    Raises:
        UserError: it cannot update this model, or its state is to be sharded over ranks, and it cannot do that.
    """
    recipe = chosen(options)
    if recipe.whole and is_sharded(model):
        raise UserError(f"--optimizer {options.optimizer} cannot update sharded tensors; pass --parallel ddp")
    if oss:
        wrapped: Optimizer = packages.load("fairscale.optim").OSS(
            recipe.groups(model), optim=lambda groups: recipe.make(Owned(groups), settings)
        )
        return wrapped
    if shard_over is None:
        return recipe.make(model, settings)
    if options.optimizer != "sm3":
        raise UserError(
            f"--parallel zero1 is for --optimizer sm3; {options.optimizer} holds the state of every parameter on every "
            "rank, pass --parallel ddp"
        )
    return recipe.make(model, settings, shard_over=shard_over)


def use_in_backward(model: nn.Module, optimizer: Optimizer, options: Options) -> None:
    """Let the steps be taken during backward.

    Raises:
        UserError: the optimizer is another, or gradients are not final when backward leaves them.
    """
    if not isinstance(optimizer, SM3):
        given = f"--parallel {options.parallel}" if options.optimizer == "sm3" else f"--optimizer {options.optimizer}"
        raise UserError(f"--step-in-backward is for --optimizer sm3 on its own, and {given} uses another; leave it out")
    try:
        step_in_backward(model, optimizer, clip_value=options.clip_value)
    except ValueError as error:
        raise UserError(f"--step-in-backward: {error}") from error


def schedule(optimizer: Optimizer, options: Options) -> LambdaLR:
    """Make the scheduler, to be stepped after every optimizer step."""
    return LambdaLR(optimizer, SCHEDULES[options.schedule](options.steps))


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the optimizer's state that this rank holds."""
    return count_bytes(dict(getattr(optimizer, "optim", optimizer).state))  # of an OSS that of the one within


def adamw_bytes(optimizer: Optimizer) -> int:
    """Bytes that AdamW would hold for the same parameters here: two moments each."""
    return 2 * sum(count_bytes(group["params"]) for group in optimizer.param_groups)


def count_bytes(value: Any) -> int:
    """Bytes of all tensors in ``value``, of those made of others their parts on this rank."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):  # made of others: a DTensor, or torchao's codes and scales
            return sum(count_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(count_bytes(each) for each in value.values())
    if isinstance(value, (list, tuple)):
        return sum(count_bytes(each) for each in value)
    return 0
