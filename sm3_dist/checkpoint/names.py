"""Canonical names: what the parameters are called in the model that nobody has wrapped."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from sm3_dist.layout.flat_metadata import INNER
from sm3_dist.layout.kinds import reshard


def canonical_names(model: nn.Module) -> dict[Tensor, str]:
    """The name that each parameter of a wrapped model would have without the wrappers.

    A parameter that occurs in several places has the name of the first one. A flattened parameter has that of the
    module whose parameters it holds, with the wrapper's own name for it at the end.

    Example:
        >>> from torch import nn
        >>> inner = nn.Linear(2, 3, bias=False)
        >>> list(canonical_names(nn.Sequential(nn.DataParallel(inner))).values())
        ['0.weight']
    """
    reshard(model)
    names: dict[Tensor, str] = {}
    for prefix, module in canonical_modules(model):
        for name, parameter in module.named_parameters(recurse=False):
            names.setdefault(parameter, prefix + name)
    return names


def canonical_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module, as often as it occurs, with what the names of its parameters begin with."""
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from canonical_modules(child, prefix if _wraps(module, name) else f"{prefix}{name}.")


def _wraps(module: nn.Module, name: str) -> bool:
    if name in INNER:
        return True
    replicates = isinstance(module, (DataParallel, DistributedDataParallel))
    return name == "module" and (replicates or type(module).__name__ == "ShardedDataParallel")
