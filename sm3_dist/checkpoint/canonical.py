"""The canonical form of SM3's state: by parameter name, the same for every wrapper, mesh and number of ranks.

For each original tensor of shape ``(n_1, …, n_k)``: ``step``; ``accumulator_i`` of shape ``(n_i,)`` (with block covers:
of the shape of its grid, see :mod:`~sm3_dist.layout.cover`); with momentum ``momentum_buffer`` of the tensor's shape,
or in 8 bits ``momentum_e3m4`` (:mod:`~sm3_dist.maths.momentum_code`); with ``update_rms`` the scalar
``update_square_average``. What a rank holds of a value is a list of boxes (one for a whole tensor or a DTensor, several
for a flat range), so reading and writing state are the same for all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from sm3_dist.checkpoint.boxed import BoxedTensor, of_all_ranks, of_any_rank, who_differ
from sm3_dist.checkpoint.keys import ADAMS, MOMENTA, OPTIONAL, missing_key, surplus
from sm3_dist.checkpoint.keys import missing as missing_names
from sm3_dist.checkpoint.names import canonical_names
from sm3_dist.checkpoint.options import saved_options, take_over
from sm3_dist.checkpoint.slots import Reader, Slot, values
from sm3_dist.checkpoint.state_slots import SCALAR, absent_slots, slots_of
from sm3_dist.layout.shard import LocalShard
from sm3_dist.maths.momentum_code import (
    OLD_CODE,
    converted,
    momentum_key,
    refusal_of_old_codes,
)
from sm3_dist.optimizer import SM3
from sm3_dist.step.entry import Entry
from sm3_dist.step.param_groups import validate_loaded


class Canonical:
    """SM3's state, seen by name. Making one waits for the maxima on their way; do it on every rank.

    Args:
        model: the wrapped root module.
        optimizer: trains (some of) its parameters: SM3, or fairscale's OSS with SM3 in it. SM3's plan is made now, if
            it has not been yet.

    Raises:
        ValueError: if a parameter of the optimizer is not one of the model.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        inner = sm3_within(optimizer)
        assert inner is not None
        self.optimizer = inner
        # OSS knows all parameters; the optimizer in it has those of this rank, which nobody else has.
        self.groups_of_all = optimizer.param_groups
        self.apart = optimizer is not inner
        for own, group in zip(inner.param_groups, self.groups_of_all, strict=True):
            group.update({**own, **group})  # as OSS will in its next step, where one was added
        # OSS, and PyTorch's ZeroRedundancyOptimizer
        together = getattr(optimizer, "group", None) or getattr(optimizer, "process_group", None)
        self.ranks = tuple(dist.get_process_group_ranks(together)) if self.apart else ()
        self._names = canonical_names(model)
        self._room: list[Tensor] = []  # frozen parameters that were given state to be loaded
        self._changes: list[dict[str, Any]] = []  # of the param groups, to be loaded
        self._refresh()

    def _refresh(self) -> None:
        plan = self.optimizer._current_plan()
        plan.receive()
        plan.publish()
        self.entries = {self._name(entry.param, entry.shard, entry.label): entry for entry in plan.entries}

    def _name(self, param: Tensor, shard: LocalShard, label: str) -> str:
        if param not in self._names:
            raise ValueError(
                f"{label} of the optimizer, of shape {tuple(param.shape)}, is not a parameter of the model. Pass the "
                "wrapped root module whose parameters the optimizer got."
            )
        return shard.name or self._names[param]

    def group_names(self) -> list[list[str]]:
        """For each param group the names of its original tensors, frozen ones included."""
        return [
            [self._name(param, shard, label) for param, label, shard in self._originals(group, g)]
            for g, group in enumerate(self.groups_of_all)
        ]

    def _originals(self, group: Mapping[str, Any], g: int) -> Iterator[tuple[Tensor, str, LocalShard]]:
        for index, param in enumerate(group["params"]):
            label = f"parameter {index} of param group {g}"
            for shard in self.optimizer._keeper.describe(param, label, group["cover_block"]):
                yield param, label, shard

    def make_room(self, names: Collection[str]) -> list[Tensor]:
        """Make states for those of the named tensors that are frozen and have none; names are the same on every rank.

        Returns:
            Their parameters.
        """
        found = []
        for g, group in enumerate(self.optimizer.param_groups):
            for param, label, shard in self._originals(group, g):
                stateless = param not in self.optimizer._keeper.states
                if stateless and not param.requires_grad and self._name(param, shard, label) in names:
                    self.optimizer._keeper.states[param] = {}
                    found.append(param)
        if found:
            self._refresh()
        return found

    def check_ahead(self, keys: Mapping[str, Sequence[str]], groups: Sequence[Mapping[str, Any]]) -> None:
        """Find what :meth:`prepare` would, before a checkpoint is loaded in place. What it lacks shows there.

        Args:
            keys: those of each tensor that the checkpoint has.
            groups: its param groups, with names; empty where they are not known.

        Raises:
            ValueError: its groups do not fit, or there is no place for something of it.
        """
        error: Exception | None = None
        try:
            self._changed_groups(self._matching_options(groups, strict=False, spared=()))
            for name, entry in self.entries.items():
                mine = self.slots(entry)
                more = [key for key in keys.get(name, ()) if key not in mine]
                if more and mine.keys() <= set(keys[name]):
                    raise ValueError(surplus(name, more))
        except (TypeError, ValueError) as found:
            error = found
        error = of_any_rank(error, self.ranks) if self.apart else error
        if error is not None:
            raise error

    def give_up(self) -> None:
        """Take back what :meth:`prepare` did."""
        for param in self._room:
            del self.optimizer._keeper.states[param]
        if self._room:
            self._room = []
            self._refresh()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The state by name: live tensors and DTensors, and for flat ranges BoxedTensors with views of the state."""
        slots: dict[str, dict[str, Slot]] = {}
        if not self.apart:
            slots = {name: self.slots(entry) for name, entry in self.entries.items()}
        else:  # the same ones, in the same order, on every rank
            known = of_all_ranks(self.entries, self.ranks)
            for g, group in enumerate(self.groups_of_all):
                for param, label, shard in self._originals(group, g):
                    name = self._name(param, shard, label)
                    if name in self.entries:
                        mine = self.slots(self.entries[name])
                        slots[name] = {key: replace(slot, whole=False, ranks=self.ranks) for key, slot in mine.items()}
                    elif name in known:
                        slots[name] = absent_slots(param, shard, group, self.optimizer.momentum_dtype, self.ranks)
        result: dict[str, dict[str, Tensor]] = {name: {} for name in slots}
        together = {(name, key): slot for name, mine in slots.items() for key, slot in mine.items()}
        if self.optimizer.shard_covers:  # by which steps free their memory
            together = {at: slot.copied() if "accumulator_" in at[1] else slot for at, slot in together.items()}
        for (name, key), value in values(together).items():
            result[name][key] = value
        return result

    def groups(self) -> list[dict[str, Any]]:
        """The param groups, with names in place of parameters."""
        return [
            {"params": names, **saved_options(group)}
            for names, group in zip(self.group_names(), self.groups_of_all, strict=True)
        ]

    def prepare(
        self,
        shapes: Mapping[str, Mapping[str, Any]],
        groups: Sequence[Mapping[str, Any]],
        strict: bool,
        spared: Collection[str] = (),
    ) -> None:
        """Check state by name that is then to be taken over with :meth:`load`, or to be given up.

        Args:
            shapes: for each name and key something with the ``shape`` of the value.
            groups: the param groups, with names.
            strict: whether every trained tensor must be there.
            spared: names that need not.

        Raises:
            ValueError: names are missing, shapes or hyperparameters do not fit; the optimizer is then as it was.
        """
        error: Exception | None = None
        try:
            self._changes = self._matching_options(groups, strict, spared)
            self._room = self.make_room(shapes)
            self._check(shapes, self._changes, strict, spared)
        except (TypeError, ValueError) as found:
            error = found
        for ranks in who_differ((value for each in shapes.values() for value in each.values()), self.ranks):
            error = of_any_rank(error, ranks)
        if error is not None:
            self.give_up()
            raise error

    def load(self, loaded: Values) -> None:
        """Take over what was prepared.

        Args:
            loaded: name, key and value, in the same order on every rank; whole tensors, DTensors or BoxedTensors.
        """
        for groups in (self.groups_of_all, self.optimizer.param_groups):
            take_over(groups, self._changes)
        self._refresh()
        slots = {name: self.slots(entry) for name, entry in self.entries.items()}
        steps: dict[Tensor, list[Tensor]] = defaultdict(list)
        for name, key, value in loaded:
            slot = _place(slots.get(name, {}), key)
            reader = Reader(value, slot.tensor if slot and slot.whole else None)
            if slot is None:
                continue
            if key == "step":  # one for all tensors of a flattened parameter
                steps[self.entries[name].param].append(reader.read(SCALAR))
                continue
            for box, part in zip(slot.boxes, slot.parts, strict=True):
                part.copy_(converted(reader.read(box), part.dtype) if key in MOMENTA else reader.read(box))
        for param, counts in steps.items():
            self.optimizer._keeper.states[param]["step"].copy_(torch.stack([c.float().cpu() for c in counts]).max())
        self.optimizer._keeper.written_into(self.optimizer.param_groups)

    def slots(self, entry: Entry) -> dict[str, Slot]:
        """What this rank holds of the state of one original tensor."""
        return slots_of(entry, self.optimizer._keeper.states[entry.param])

    def _matching_options(
        self, groups: Sequence[Mapping[str, Any]], strict: bool, spared: Collection[str]
    ) -> list[dict[str, Any]]:
        """For each param group the hyperparameters under which its tensors were saved."""
        saved = {name: group for group in groups for name in group["params"]}
        result = []
        for names in self.group_names():
            found = {id(saved[name]): saved[name] for name in names if name in saved}
            missing = [n for n in names if n not in saved and n in self.entries and n not in spared]
            if strict and missing:
                raise ValueError(missing_names(missing, saved))
            # (Which tensors are made orthogonal is for each layout to say in its own way.)
            options = [
                {k: v for k, v in saved_options(group).items() if k != "orthogonalize"} for group in found.values()
            ]
            for other in options[1:]:
                if other != options[0]:
                    keys = {**options[0], **other}
                    differ = [k for k in keys if k not in other or other[k] != options[0].get(k, other)]
                    words = ", ".join(f"{k} of {options[0].get(k)} and of {other.get(k)}" for k in differ)
                    raise ValueError(
                        f"the param group of {names[0]!r} holds tensors that were saved in groups with different "
                        f"hyperparameters: {words}. Make the param groups as they were when saving."
                    )
            result.append(options[0] if options else {})
        return result

    def _changed_groups(self, changes: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """The param groups with loaded hyperparameters, by the ``id`` of the group. Raise if those do not fit."""
        new = {}
        for g, (group, change) in enumerate(zip(self.optimizer.param_groups, changes, strict=True)):
            new[id(group)] = {**group, **change}
            validate_loaded(new[id(group)], g, self.optimizer.momentum_dtype)
            if new[id(group)]["cover_block"] != group["cover_block"]:
                raise ValueError(
                    f"the tensors of param group {g} were saved with cover_block={change['cover_block']}, but this "
                    f"optimizer has cover_block={group['cover_block']}, and accumulators of one cannot become those of "
                    f"the other. Make the optimizer with the recipe of then, and cover_block={change['cover_block']}."
                )
        return new

    def _check(
        self,
        shapes: Mapping[str, Mapping[str, Any]],
        changes: list[dict[str, Any]],
        strict: bool,
        spared: Collection[str],
    ) -> None:
        """Raise unless the loaded state fits."""
        for name in self.entries:
            if ADAMS in shapes.get(name, ()):
                raise ValueError(missing_key(name, "accumulator_0", list(shapes[name])))
        missing = [name for name in self.entries if name not in shapes and name not in spared]
        if missing and strict:
            raise ValueError(missing_names(missing, shapes))
        new = self._changed_groups(changes)
        for name, entry in self.entries.items():
            if name not in shapes:
                continue
            if OLD_CODE in shapes[name]:
                raise ValueError(refusal_of_old_codes(repr(name)))
            mine, options = self.slots(entry), new[id(entry.group)]
            wanted = {key: slot.shape for key, slot in mine.items() if key not in OPTIONAL}
            if options["momentum"] > 0:
                key = momentum_key(self.optimizer.momentum_dtype or torch.float32)
                key = key if key in shapes[name] or MOMENTA[key] not in shapes[name] else MOMENTA[key]
                wanted[key] = () if entry.param.dim() == 0 else entry.shard.shape
            if options["update_rms"] is not None:
                wanted["update_square_average"] = ()
            for key, shape in wanted.items():
                if key not in shapes[name]:
                    raise ValueError(missing_key(name, key, list(shapes[name])))
                found = tuple(shapes[name][key].shape)
                if found != shape:
                    raise ValueError(
                        f"{key} of {name!r} has shape {found} in the loaded state, but this model needs {shape}. "
                        "It is the checkpoint of another model. To keep what the tensor has here, take its name out of "
                        "the loaded state and pass StateDictOptions(strict=False)."
                    )
            for key, value in shapes[name].items():
                slot = _place(mine, key)
                for box in slot.boxes if slot is not None and isinstance(value, BoxedTensor) else ():
                    value.check(box)


Values = Iterable[tuple[str, str, Tensor]]


def sm3_within(optimizer: Optimizer) -> SM3 | None:
    """The optimizer, if it is SM3, or the SM3 in fairscale's OSS; ``None`` for others."""
    inner = getattr(optimizer, "optim", None)
    return optimizer if isinstance(optimizer, SM3) else inner if isinstance(inner, SM3) else None


def _place(slots: Mapping[str, Slot], key: str) -> Slot | None:
    return slots.get(key) or slots.get(MOMENTA.get(key, ""))
