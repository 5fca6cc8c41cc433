"""What ranks there are, and how they share a model: what every reckoning of the planner begins with."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

WRAPPERS = ("none", "ddp", "zero1", "fsdp2", "hsdp", "tp", "fsdp1", "fairscale")
"""One process; DistributedDataParallel, alone and with ``SM3(shard_over=)``; ``fully_shard`` over all ranks, and over
those of each replica; tensor parallel; torch's FullyShardedDataParallel and fairscale's."""

WITH_TENSOR_PARALLEL = ("fsdp2", "hsdp")
"""Wrappers that cut what tensor parallelism has left."""

MOST_RANKS = 1_000_000
"""Lest somebody's slip of a finger takes all memory: bytes are told rank by rank."""


@dataclass(frozen=True)
class Sharding:
    """A model, the ranks that share it, and how; :meth:`of` makes one of what users say.

    Attributes:
        module: the model, not wrapped.
        wrapper: one of :data:`WRAPPERS`.
        mesh: over how many ranks (of a replica, for HSDP) the wrapper cuts, and over how many tensor parallelism does.
        copies: how many such meshes there are, which hold the same: the replicas of HSDP.
        units: the submodules that are wrapped one by one, before the root.
        tensor_parallel: the dimension in which each parameter is cut, by name; others are replicated.
    """

    module: nn.Module
    wrapper: str
    mesh: tuple[int, int]
    copies: int = 1
    units: Collection[nn.Module] = ()
    tensor_parallel: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        *,
        world: int = 1,
        wrapper: str = "none",
        replicas: int = 2,
        units: Collection[nn.Module] = (),
        tensor_parallel: Mapping[str, int] | None = None,
        tp_size: int | None = None,
    ) -> Sharding:
        """Read the arguments of :func:`sm3_dist.plan` that have these names.

        Raises:
            ValueError: for what cannot be planned.

        Example:
            >>> Sharding.of(nn.Linear(2, 2), world=8, wrapper="hsdp").mesh
            (4, 1)
        """
        if wrapper not in WRAPPERS:
            raise ValueError(f"wrapper must be one of {', '.join(map(repr, WRAPPERS))}, but is {wrapper!r}")
        if not 1 <= world <= MOST_RANKS:
            raise ValueError(f"world must be at least 1 and at most {MOST_RANKS:,}, but is {world:,}")
        if wrapper == "none" and world > 1:
            raise ValueError(f"{world} ranks with wrapper={wrapper!r}: name how they share the work, or take world=1")
        copies = replicas if wrapper == "hsdp" else 1
        if copies < 1 or world % copies:
            raise ValueError(
                f"{world} ranks cannot hold {replicas} replicas of equal size; replicas must divide the ranks"
            )
        parts = _tensor_parallel_ranks(wrapper, world // copies, copies, tp_size)
        if parts is not None:
            _check_tensor_parallel(module, wrapper, tensor_parallel)
        mesh = (world // copies // (parts or 1), parts or 1)
        return cls(module, wrapper, mesh, copies, units, tensor_parallel or {})

    @property
    def ranks(self) -> int:
        """How many there are in one copy."""
        return math.prod(self.mesh)

    @property
    def replicated(self) -> bool:
        """Whether the wrapper leaves every parameter whole on every rank."""
        return self.wrapper in ("none", "ddp", "zero1")

    @property
    def by_rows(self) -> bool:
        """Whether the wrapper cuts the first dimension of each parameter."""
        return self.wrapper in WITH_TENSOR_PARALLEL

    @property
    def flat(self) -> bool:
        """Whether the wrapper lays the parameters of a unit one after another, and cuts that."""
        return self.wrapper in ("fsdp1", "fairscale")

    def cuts(self, name: str) -> tuple[int | None, int | None]:
        """For each dimension of the mesh that of a parameter which it cuts; ``None`` where it has replicas."""
        return 0 if self.by_rows else None, self.tensor_parallel.get(name)


def _tensor_parallel_ranks(wrapper: str, ranks: int, copies: int, tp_size: int | None) -> int | None:
    """Over how many ranks of a copy tensor parallelism cuts; ``None`` where there is none."""
    if wrapper == "tp":
        if tp_size not in (None, ranks):
            raise ValueError(f"tp_size={tp_size} with wrapper='tp', which is over all {ranks} ranks; leave it out")
        return ranks
    if tp_size is None:
        return None
    if wrapper not in WITH_TENSOR_PARALLEL:
        known = ", ".join(map(repr, WITH_TENSOR_PARALLEL))
        raise ValueError(f"tp_size={tp_size} with wrapper={wrapper!r}: tensor parallelism goes together with {known}")
    if tp_size < 1 or ranks % tp_size:
        raise ValueError(f"tp_size={tp_size} must divide the {ranks} ranks{' of a replica' * (copies > 1)}")
    return tp_size


def _check_tensor_parallel(module: nn.Module, wrapper: str, cuts: Mapping[str, int] | None) -> None:
    """Refuse dimensions of parameters that the model does not have."""
    if cuts is None:
        raise ValueError(
            f"wrapper={wrapper!r} {'' if wrapper == 'tp' else 'with tp_size= '}needs tensor_parallel=, the dimension "
            "in which each parameter is cut, by name"
        )
    params = dict(module.named_parameters())
    for name, axis in cuts.items():
        if name not in params:
            raise ValueError(f"tensor_parallel= names {name!r}, and the model has no parameter of that name")
        if not 0 <= axis < params[name].dim():
            raise ValueError(f"tensor_parallel= cuts {name!r} in dimension {axis}, and it has {params[name].dim()}")
