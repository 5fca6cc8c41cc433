"""PlanKeeper: the states of all parameters and the plan made of them, made anew when what it was made of changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sm3_dist.compiled.library import integers
from sm3_dist.compiled.look import Held
from sm3_dist.layout.describe import Flattened, Replicas, describe
from sm3_dist.layout.shard import LocalShard
from sm3_dist.ranks.agreement import check_agreement
from sm3_dist.ranks.watch import PlanMismatchError, RankWatch
from sm3_dist.ranks.weight_gather import WeightGatherer
from sm3_dist.step.blank_step import refuse_parts
from sm3_dist.step.capture import refuse_to_plan
from sm3_dist.step.cut_cover import CutCover, cut_covers
from sm3_dist.step.entry import Entry
from sm3_dist.step.guard import Skipping
from sm3_dist.step.kernel import Launcher
from sm3_dist.step.lookout import Lookout
from sm3_dist.step.param_groups import (
    SQUARE_AVERAGES,
    ParamGroup,
    can_move,
    label_of,
    labelled_params,
    layout_options,
    which_can_move,
)
from sm3_dist.step.plan import StepPlan, agreement_lines, change
from sm3_dist.step.positions import Positions
from sm3_dist.step.state import (
    State,
    accumulator_keys,
    adopt_state,
    check_accumulators,
    fill_state,
    held_accumulators,
    local_momentum,
    local_square_sum,
    mend_state,
    parameter_shaped,
    square_averages,
    with_copies,
    with_square_averages,
)
from sm3_dist.step.watch import Watch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PATIENCE = timedelta(seconds=25)
"""How long a rank that plans anew waits for ranks that it exchanges nothing with: they may never come."""
_LOADED = "Its state was loaded, replaced or written into: do that on every rank, between the same two steps."

States = defaultdict[Tensor, State]
Fitted = dict[Tensor, tuple[State, tuple[LocalShard, ...]]]
"""States with the layout that each was made for."""


class PlanKeeper:
    """Keeps states and plan of one optimizer.

    Param groups belong to the optimizer, where anybody may change them; so every method is given them as they are.

    Args:
        flattened: what is known of the model's flattened parameters.
        replicas: who updates what, where parameters are replicated; else ``None``.
        momentum_dtype: type of new momentum buffers; ``None`` for that of the accumulators.
        shard_covers: see :class:`~sm3_dist.ranks.bucket.MaxBucket`.
        launch_list: makes of entries the kernels that step them.
        skipping: what gradients that are not finite have skipped.
        unscales: whether steps unscale gradients, and ask all ranks whether they are finite.

    Attributes:
        states: the state of each parameter, as far as it has one. Maxima may still be on their way to it: who looks at
            values asks :meth:`received`.
        positions: where parameters stood in the param groups when it last made a plan.
    """

    def __init__(
        self,
        flattened: Flattened,
        replicas: Replicas | None,
        momentum_dtype: torch.dtype | None,
        shard_covers: bool,
        launch_list: Launcher,
        skipping: Skipping,
        unscales: bool,
    ) -> None:
        self.flattened = flattened
        self.replicas = replicas
        self.states: States = defaultdict(dict)
        self.positions = Positions()
        self._momentum_dtype = momentum_dtype
        self._shard_covers = shard_covers
        self._launch_list = launch_list
        self._skipping = skipping
        self._asks_first = replicas is not None or skipping.mode is not None or unscales
        self.watch = RankWatch()
        self._lookout = Lookout(self.watch)
        self._layouts: dict[tuple[int, ...], list[str]] = {}  # on which ranks have agreed
        self._plan: StepPlan | None = None
        self._older: StepPlan | None = None  # while there is no plan, the one before
        self._of_graphs: list[StepPlan] = []  # CUDA graphs refer to their tables by address
        self._fitted: Fitted = {}
        self._changed: set[Tensor] = set()  # since the plan before, while one is made
        self._watch, self._held = Watch({}), Held([])
        self._unshared = False  # whether accumulators are yet to be made maxima over all ranks
        self._signature: tuple[Any, ...] = ()
        self._process_groups: dict[tuple[int, ...], ProcessGroup] = {}

    def attach(self, model: nn.Module) -> None:
        """Read flattened parameters in this model from now on, and plan anew."""
        self.flattened = Flattened(model)
        self._signature = ()

    # ---------------------------------------------------------------------------------------------- the plan

    def current(self, groups: Sequence[ParamGroup]) -> StepPlan:
        """The plan, made anew where parameters were added, exchanged, wrapped, frozen or thawed, or their state was.

        Where tensors were only moved, replaced or laid out anew, this rank makes its own anew, and asks no other.
        """
        older, agreed = self._plan, False
        same = self._held.is_unchanged() and self._signature == self._sign(groups)
        if older is None or not same or older.edited or self._watch.sees_a_change():
            refuse_to_plan(param for group in groups for param in group["params"])
            if older is not None:
                older.receive()
                older.publish()
                self._older = older
            self._plan = self._make_plan(groups, {} if older is None else older.working_copies)
            if older is not None:
                self._plan.carry_over_squares(older)
            self._older, agreed = None, True
            self._held, self._signature = Held([self.states]), self._sign(groups)
            self._watch = self._new_watch(self._plan)
        assert self._plan is not None
        self.watch.have_plan()
        if self._plan.captured:
            self._of_graphs.append(self._plan)
        if self._unshared or self._plan.needs_sharing:
            self._unshared = False
            self._plan.share("" if agreed else "loaded a state")
        return self._plan

    def _sign(self, groups: Sequence[ParamGroup]) -> tuple[Any, ...]:
        """What the plan depends on besides the states, which keep parameters alive: no other gets the id of one."""
        return tuple(
            part
            for group in groups
            for part in (layout_options(group), integers(map(id, group["params"])), which_can_move(group["params"]))
        )

    def _new_watch(self, plan: StepPlan) -> Watch:
        shared = [entry for entry in plan.entries if self._shard_covers and any(entry.shard.shared)]
        released = (self.states[entry.param][key] for entry in shared for key in accumulator_keys(entry.shard))
        return Watch({entry.param: self.states[entry.param] for entry in plan.entries}, released)

    def _make_plan(self, groups: Sequence[ParamGroup], working_copies: Mapping[int, CutCover]) -> StepPlan:
        """A new plan, with states for all parameters that can move; compared with those of the other ranks.

        Args:
            groups: the param groups.
            working_copies: those of the plan before, by the ``id`` of the state tensor.
        """
        self.flattened.read()
        self._changed = self._watch.changed
        self._follow_exchanged_params(groups)
        if self.replicas is not None:
            self.replicas.include(self._active_params(groups))
        labelled = labelled_params(groups)
        shards = {param: self.describe(param, label, group["cover_block"]) for param, label, group in labelled}
        numbers = self.flattened.numbered((param, shard.name) for param in shards for shard in shards[param])
        entries = []
        for param, label, group in labelled:
            if can_move(param) or param in self.states:
                entries += self._entries(param, label, group, shards[param], numbers, working_copies)
        self._fitted = {param: fitted for param, fitted in self._fitted.items() if param in self.states}
        self._changed = set()
        self.positions.remember(groups)
        self._agree(entries)
        gatherer = None
        if self.replicas is not None:
            moving = {entry.param for entry in entries if can_move(entry.param)}
            gatherer = WeightGatherer(self.replicas.group, self.replicas.partitions, moving, self.watch)
        plan = StepPlan(entries, self._launch_list, self._shard_covers, self._process_groups, self._lookout, gatherer)
        self._launch_list.review(entries)
        return plan

    def _agree(self, entries: Sequence[Entry]) -> None:
        """Compare the plan with those of the other ranks, unless it exchanges what the one before it did."""
        layouts = agreement_lines(entries, Entry.describe_layout)
        differs = layouts != self._layouts
        if not (differs or self._unshared or any(cover.fresh for entry in entries for cover in entry.cut_covers)):
            return
        patience, words = {}, ""
        if self._older is not None:
            words = change(self._layouts, layouts) or _LOADED
            self.watch.plan_anew(words)
            if differs and not self._asks_first:  # else the others' next collective is another one: they find the note
                self._older.tell("planned anew", words)
                self._older.receive()
            patience = dict.fromkeys(self._lookout.unsealed, PATIENCE)
        origin = "state loaded" if self._unshared else "state of its own steps"  # what is loaded is exchanged at once
        plans = agreement_lines(entries, lambda entry: f"{entry.describe()}, {self._skipping}, {origin}")
        try:
            self.watch.follow(check_agreement(plans, self.watch, patience) if plans else {})
        except PlanMismatchError as error:
            raise PlanMismatchError(f"{error}\n{words}".rstrip()) from error
        self._layouts = layouts

    def _entries(
        self,
        param: Tensor,
        label: str,
        group: ParamGroup,
        shards: tuple[LocalShard, ...],
        numbers: dict[tuple[Tensor, str], int],
        working_copies: Mapping[int, CutCover],
    ) -> list[Entry]:
        """The original tensors of one parameter."""
        state = self._fitting_state(param, shards, label)
        fill_state(state, param, shards, group, self._momentum_dtype)
        buffer = local_momentum(state, group)
        entries = []
        for shard in shards:
            covers = cut_covers(state, shard, accumulator_keys(shard), working_copies)
            held = held_accumulators(state, shard)
            entries.append(
                Entry(
                    param,
                    group,
                    shard,
                    [part if cover is None else cover.working for part, cover in zip(held, covers, strict=True)],
                    buffer,
                    state["step"],
                    local_square_sum(state, shard, group),
                    label + (f" ({shard.name})" if shard.name else ""),
                    numbers[param, shard.name],
                    [cover for cover in covers if cover is not None],
                )
            )
        return entries

    def describe(self, param: Tensor, label: str, cover_block: int | None) -> tuple[LocalShard, ...]:
        """What this rank holds of a parameter; see :func:`sm3_dist.layout.describe.describe`."""
        return describe(param, label, self.flattened, self.replicas, cover_block)

    def _active_params(self, groups: Sequence[ParamGroup]) -> list[Tensor]:
        """The parameters that can have a gradient, or have state."""
        return [p for p, _, _ in labelled_params(groups) if can_move(p) or p in self.states]

    # ---------------------------------------------------------------------------------------------- the states

    def received(self) -> States:
        """The states, with the maxima that were on their way."""
        if self._plan is not None:
            self._plan.receive()
            self._plan.publish()
        return self.states

    def written_into(self, groups: Sequence[ParamGroup]) -> None:
        """Go on from what was written into the states in place. A collective: on every rank, if on any."""
        assert self._plan is not None
        self._plan.read_again()
        self.current(groups)

    def replace(self, states: States) -> None:
        """Take other states, of which nothing is known. The plan of the old ones goes when what it sent is here."""
        if self._plan is not None:
            self._plan.receive()
            self._older, self._plan = self._plan, None
        self.states = states
        self._fitted = {}
        self._watch = Watch({})

    def adopt(
        self, loaded: dict[str, Any], groups: Sequence[ParamGroup], cover_block: int | None
    ) -> tuple[States, Fitted]:
        """Copies of what a ``state_dict()`` holds, for the parameters of these groups. Changes nothing.

        Args:
            loaded: the state dict.
            groups: the param groups.
            cover_block: that of loaded groups that do not say theirs.

        Raises:
            ValueError: if it is of another optimizer, or a tensor does not have the shape that this rank stores.
        """
        self.received()  # what is loaded may be what the plan works on
        adopted: defaultdict[Any, State] = defaultdict(dict)
        fitted: Fitted = {}
        loaded_groups = {key: group for group in loaded["param_groups"] for key in group["params"]}
        params = dict(zip(loaded_groups, labelled_params(groups), strict=False))  # the caller compares the lengths
        if self.replicas is not None:
            self.replicas.include(self._active_params(groups))
            self.replicas.include(params[key][0] for key in loaded["state"] if key in params)
        for key, (param, label, group) in params.items():
            if key not in loaded["state"] and SQUARE_AVERAGES not in loaded_groups[key]:
                continue  # nothing to adopt, of a model that is perhaps yet to be attached
            shards = self.describe(param, label, loaded_groups[key].get("cover_block", cover_block))
            value = loaded["state"].get(key, {})
            if param in self.flattened:  # FSDP1 leaves out what lies on other ranks; they share the averages
                value = with_square_averages(value, loaded_groups[key], shards, self.flattened.names(param), label)
            if value or key in loaded["state"]:
                adopted[param] = adopt_state(value, param, shards, label, self._momentum_dtype)
                if param not in self.flattened:
                    check_accumulators(value, shards[0], label)
                elif key not in loaded["state"]:
                    fill_state(adopted[param], param, shards, {**group, **loaded_groups[key]}, self._momentum_dtype)
                fitted[param] = (adopted[param], shards)
        adopted.update((key, value) for key, value in loaded["state"].items() if key not in params)
        return adopted, fitted

    def to_hand_out(self, state_dict: dict[str, Any], groups: Sequence[ParamGroup]) -> dict[str, Any]:
        """A state dict that lasts, and where tensors of flattened parameters have their shape, as FSDP1 wants it."""
        refuse_parts(self.replicas, self.flattened)
        labelled = iter(enumerate(labelled_params(groups)))
        for saved in state_dict["param_groups"]:
            averages: dict[str, int] = {}
            for number, (param, label, group) in islice(labelled, len(saved["params"])):
                state = state_dict["state"].get(number)
                if state is not None and param in self.flattened:
                    shards = self.describe(param, label, group["cover_block"])
                    averages |= square_averages(state, shards, self.flattened.names(param))
                    state_dict["state"][number] = parameter_shaped(state, param, shards)
                elif state is not None and self._shard_covers:
                    state_dict["state"][number] = with_copies(state)
            saved |= {SQUARE_AVERAGES: averages} if averages else {}
        return state_dict

    def install(self, states: States, fitted: Fitted, groups: Sequence[ParamGroup]) -> None:
        """Take the states that :meth:`adopt` made, or that came with a copy of an optimizer."""
        self.replace(states)
        self._fitted = fitted
        self._unshared = any(param in self.flattened for param, _, _ in labelled_params(groups))
        self.positions.remember(groups)

    def check_copyable(self, groups: Sequence[ParamGroup]) -> None:
        """Refuse to copy or pickle what belongs to a process group or to a model.

        Raises:
            TypeError: says what to do.
        """
        if self.replicas is not None:
            raise TypeError("SM3 with shard_over= holds a process group and cannot be pickled; save its state_dict()")
        if any(param in self.flattened for param, _, _ in labelled_params(groups)):
            raise TypeError(
                "SM3 of a model with flattened parameters cannot be copied or pickled: its copy would not belong to "
                "the model. Make a new SM3 of the other model, and load what state_dict() returns."
            )

    def _fitting_state(self, param: Tensor, shards: tuple[LocalShard, ...], label: str) -> State:
        """The state of a parameter, if it fits the layout. One that somebody else put there is copied in our types."""
        state = self.states[param]
        fitted = self._fitted.get(param)
        if fitted is None or fitted[0] is not state:
            if state:
                state = adopt_state(state, param, shards, label, self._momentum_dtype)
            self.states[param] = state
        elif [shard.signature for shard in fitted[1]] != [shard.signature for shard in shards]:
            raise ValueError(
                f"{label} is laid out otherwise than when its state was made: it was {fitted[1][0].signature} and is "
                f"{shards[0].signature}. Make a new optimizer after wrapping a model or changing its covers, and move "
                "the state through a checkpoint."
            )
        elif param in self._changed:
            mend_state(state, param, shards, label, self._momentum_dtype)
        self._fitted[param] = (state, shards)
        return state

    def _follow_exchanged_params(self, groups: Sequence[ParamGroup]) -> None:
        """Hand on the state of parameters that somebody replaced in ``param_groups``."""
        for old, g, index in self.positions.exchanged(groups):
            param = groups[g]["params"][index]
            if old in self.states and param not in self.states:
                label = label_of(groups[g], g, index)
                if self.replicas is not None:
                    self.replicas.exchange(old, param)
                shards = self.describe(param, label, groups[g]["cover_block"])
                self.states[param] = adopt_state(self.states[old], param, shards, label, self._momentum_dtype)
                del self.states[old]
