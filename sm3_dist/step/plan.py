"""StepPlan: every tensor with its shard and state, and a bucket per process group. Made once, used every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sm3_dist.layout.describe import local_tensor
from sm3_dist.layout.kinds import dtensors
from sm3_dist.layout.shard import Peers
from sm3_dist.maths.rms import Averages, Averaging, SquareSum
from sm3_dist.maths.update import Settings
from sm3_dist.ranks.bucket import MaxBucket, Slot, SumBucket
from sm3_dist.ranks.chunk_exchange import ChunkExchange, Lending
from sm3_dist.ranks.watch import RankWatch
from sm3_dist.ranks.weight_gather import Parts, WeightGatherer
from sm3_dist.step.capture import capturing
from sm3_dist.step.cut_cover import CutCover
from sm3_dist.step.entry import Entry
from sm3_dist.step.guard import FiniteGuard
from sm3_dist.step.kernel import Launcher
from sm3_dist.step.lookout import Lookout
from sm3_dist.step.orthogonal import OrthogonalSteps, is_orthogonal

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class StepPlan:
    """What one step works through.

    Args:
        entries: the tensors, in the order of the param groups.
        launch_list: makes of tensors the kernels that step them.
        shard_covers: see :class:`~sm3_dist.ranks.bucket.MaxBucket`.
        groups: process groups by ranks, made so far; new ones are added.
        lookout: tells a rank apart that does something else.
        gatherer: brings the new weights to the other ranks, where parameters are replicated.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        launch_list: Launcher,
        shard_covers: bool,
        groups: dict[tuple[int, ...], ProcessGroup],
        lookout: Lookout,
        gatherer: WeightGatherer | None = None,
    ) -> None:
        self.entries = entries
        self._groups = groups
        self._lookout = lookout
        lookout.plan(entries)
        self.buckets = _buckets(entries, shard_covers, groups, lookout, launch_list.averaging)
        self.exchanges = _exchanges(entries, groups, lookout.watch)
        lookout.check_the_others()
        self.gatherer = gatherer
        self.guard = FiniteGuard(entries, groups, lookout.watch)
        self._params = list(dict.fromkeys(entry.param for entry in entries))
        self._cut_covers = [cover for entry in entries for cover in entry.cut_covers]
        self._published = True  # whether the state holds what working copies do
        matrices = [entry for entry in entries if is_orthogonal(entry)]
        others = [entry for entry in entries if not is_orthogonal(entry)]
        self.orthogonal = OrthogonalSteps(
            matrices, launch_list, groups, {entry.param for entry in others}, lookout.watch
        )
        stages = _stages(others, gatherer)
        self._stages = [(launch_list(these), weights) for these, weights in stages]
        self._sharded = bool(dtensors(self._params))
        self._devices = {local_tensor(param).device for param in self._params}

    def receive(self) -> None:
        """Bring the accumulators up to date with what the other ranks sent at the end of the last step."""
        if self.captured:
            self._refuse_capture()
        unedited = [cover for cover in self._cut_covers if not cover.edited()]
        for bucket in self.buckets:
            bucket.finish()
        for cover in unedited:  # a step may have been counted
            cover.note()
        for exchange in self.exchanges:  # what comes from states is not among the maxima
            exchange.finish()

    @property
    def captured(self) -> bool:
        """Whether what is launched now becomes part of a CUDA graph."""
        return any(map(capturing, self._devices))

    def _refuse_capture(self) -> None:
        """Raise where a CUDA graph cannot hold a step.

        Raises:
            RuntimeError: if a step is more than launches on this rank's GPU.
        """
        shared = [*self.exchanges, *(bucket for bucket in self.buckets if bucket.group is not None)]
        if shared or self.gatherer is not None or self.orthogonal.buckets:
            raise RuntimeError(
                "a CUDA graph is being captured, but a step of these tensors is more than launches on one GPU: ranks "
                "exchange accumulators or weights, or matrices are orthogonalized. Capture forward and backward, and "
                "call optimizer.step() outside of the graph."
            )

    def publish(self) -> None:
        """Write into the state what working copies hold. What others changed in it since stays."""
        if self._published:
            return
        self._published = True
        unchanged = [cover for cover in self._cut_covers if not cover.edited()]
        for exchange in self.exchanges:
            exchange.publish()
        for cover in unchanged:
            cover.publish()
            cover.note()

    @property
    def edited(self) -> bool:
        """Whether somebody else wrote into a state of which there is a working copy."""
        return any(cover.edited() for cover in self._cut_covers)

    @property
    def working_copies(self) -> dict[int, CutCover]:
        """Those of cut accumulators, by the ``id`` of the state tensor."""
        return {id(cover.held): cover for cover in self._cut_covers}

    @property
    def needs_sharing(self) -> bool:
        """Whether working copies are yet to be made of what other ranks' states hold."""
        return any(cover.fresh for cover in self._cut_covers)

    def read_again(self) -> None:
        """Make the working copies anew, of states that were written into. On every rank; to be shared next."""
        for cover in self._cut_covers:
            cover.read()
        for bucket in self.buckets:
            if isinstance(bucket, SumBucket):
                bucket.recount()

    def share(self, event: str) -> None:
        """Make every accumulator the maximum of what the ranks' states hold of it. Under way until ``receive``.

        Args:
            event: what to call it where other ranks may not do the same; else empty.
        """
        for cover in self._cut_covers:
            cover.fresh = False
        for bucket in self.buckets:  # those of sums too: a rank that does this alone is then told apart
            bucket.start(event, empty=isinstance(bucket, SumBucket))
        for exchange in self.exchanges:
            exchange.start_return()

    def note(self) -> None:
        """Remember the states as they are now: the optimizer alone changed them."""
        for cover in self._cut_covers:
            cover.note()

    def update(self, settings: Mapping[int, Settings]) -> None:
        """Update every entry, from the settings of its param group by ``id``. New weights leave as they are made."""
        try:
            stepped = self.orthogonal.update(settings)
            for launches, weights in self._stages:
                for kernel in launches:
                    stepped += kernel.update(settings)
                if self.gatherer is not None and weights is not None:
                    self.gatherer.start(weights)
        except Exception:
            self._forget()
            raise
        # (Where ranks send one another their weights, all of them have the same gradients.)
        (mark_changed if self._sharded else increment_version)(stepped)

    def carry_over_squares(self, older: StepPlan) -> None:
        """Go on adding squares where another plan was, for steps that are taken before they are sent."""
        for bucket, other in product(self.buckets, older.buckets):
            if isinstance(bucket, SumBucket) and isinstance(other, SumBucket) and bucket.counted is not None:
                bucket.carry_over(other)
        before = {(entry.param, entry.number): entry.squares for entry in older.entries}
        for entry in self.entries:
            squares = before.get((entry.param, entry.number))
            if squares is not None and entry.squares is not None:
                entry.squares.partial.copy_(squares.partial)

    def _forget(self) -> None:
        """Forget the squares of a step that failed on the way, so that the next one does not count them."""
        self.note()
        for entry in self.entries:
            if entry.squares is not None:
                entry.squares.partial.zero_()

    def count_from_0(self) -> None:
        """Let no step have been taken."""
        for entry in self.entries:
            entry.step.zero_()

    def send(self) -> None:
        """Send the new maxima, and wait for the weights that other ranks updated."""
        self._lookout.look()
        self.note()
        self._published = False
        for exchange in self.exchanges:  # reads what a bucket frees with shard_covers
            exchange.start()
        for bucket in self.buckets:
            bucket.start()
        if self.gatherer is not None:
            self.gatherer.finish()

    def tell(self, event: str, words: str) -> None:
        """Say, in place of the maxima, what this rank does and the others may not.

        Args:
            event: what it is, the same words on every rank that does it.
            words: more about it.

        Raises:
            PlanMismatchError: in :meth:`receive`, if others did not do the same.
        """
        for exchange in self.exchanges:
            exchange.start()
        for bucket in self.buckets:
            bucket.start(event, words, empty=True)


def mark_changed(params: Iterable[Tensor]) -> None:
    """Tell autograd that weights were overwritten: kernels and communication libraries write past its knowledge.

    A backward pass that still needs the old ones then raises an error, as after any step of PyTorch's own.

    Args:
        params: parameters; of a DTensor the local tensor counts too, for the graph may have seen either.
    """
    params = list(params)
    increment_version([*params, *map(local_tensor, dtensors(params))])


def agreement_lines(
    entries: Iterable[Entry], describe: Callable[[Entry], str] = Entry.describe
) -> dict[tuple[int, ...], list[str]]:
    """The plan in words, for each set of ranks that must agree on it.

    A set also hears of tensors that lie on a larger set: whoever lacks one of those differs here at the latest.
    """
    entries = [entry for entry in entries if entry.shard.ranks]
    lines: dict[tuple[int, ...], list[str]] = {}
    for ranks in {entry.shard.ranks for entry in entries}:
        wider = {other for other in {entry.shard.ranks for entry in entries} if set(ranks) <= set(other)}
        lines[tuple(sorted(ranks))] = [describe(entry) for entry in entries if entry.shard.ranks in wider]
    return lines


def change(before: Mapping[tuple[int, ...], list[str]], after: Mapping[tuple[int, ...], list[str]]) -> str:
    """The first difference between what two plans have for the same ranks, in words."""
    for ranks in {**before, **after}:
        old, new = before.get(ranks, []), after.get(ranks, [])
        if old != new:
            at = next((k for k, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
            was, now = (lines[at] if at < len(lines) else "(no more parameters)" for lines in (old, new))
            return f"Number {at} of its tensors was\n  {was}\nand is\n  {now}"
    return ""


def _stages(entries: Sequence[Entry], gatherer: WeightGatherer | None) -> list[tuple[list[Entry], Parts | None]]:
    """Entries to update one after another, each time with the bucket of weights that can leave then."""
    if gatherer is None:
        return [(list(entries), None)]
    waiting: list[Entry] = list(entries)
    stages: list[tuple[list[Entry], Parts | None]] = []
    for bucket in gatherer.buckets:
        needed = gatherer.waits_for(bucket)
        stages.append(([entry for entry in waiting if entry.param in needed], bucket))
        waiting = [entry for entry in waiting if entry.param not in needed]
    return [*stages, (waiting, None)]


def _buckets(
    entries: Sequence[Entry],
    shard_covers: bool,
    groups: dict[tuple[int, ...], ProcessGroup],
    lookout: Lookout,
    averaging: Callable[[int, torch.device], Averaging | None],
) -> list[MaxBucket | SumBucket]:
    """One bucket of each kind for each group of peers (and device), in the order in which the tensors need them."""
    slots: dict[tuple[tuple[int, ...], torch.device], list[Slot]] = {}
    sums: dict[tuple[tuple[int, ...], torch.device], list[SquareSum]] = {}
    steps: dict[tuple[tuple[int, ...], torch.device], dict[int, Tensor]] = {}
    peers: dict[tuple[int, ...], Peers] = {}
    for entry in entries:
        for accumulator, stored, shared in zip(entry.accumulators, entry.shard.stored, entry.shard.shared, strict=True):
            if shared is not None:
                slot = Slot(accumulator, stored, shared.regions, contributes=bool(entry.shard.boxes))
                slots.setdefault((shared.peers.ranks, accumulator.device), []).append(slot)
                peers.setdefault(shared.peers.ranks, shared.peers)
        listeners = entry.shard.listeners or entry.shard.holders
        if entry.squares is not None or (listeners is not None and (entry.group["bias_correction"] or entry.rounds)):
            ranks, device = listeners.ranks if listeners else (), local_tensor(entry.param).device
            sums.setdefault((ranks, device), []).extend([] if entry.squares is None else [entry.squares])
            steps.setdefault((ranks, device), {})[id(entry.step)] = entry.step
            if listeners:
                peers.setdefault(ranks, listeners)
    for ranks, these in peers.items():
        if ranks not in groups:
            groups[ranks] = these.group()
    watch = lookout.watch
    maxima = [
        MaxBucket(groups[ranks], these, device, shard_covers, watch, lookout.seal(ranks, False, device))
        for (ranks, device), these in slots.items()
    ]
    tallies = [
        SumBucket(
            groups.get(ranks),
            these,
            Averages([each.average for each in these], averaging(len(these), device)),
            list(steps[ranks, device].values()),
            device,
            watch,
            lookout.seal(ranks, True, device),
        )
        for (ranks, device), these in sums.items()
    ]
    return [*maxima, *tallies]


def _exchanges(
    entries: Sequence[Entry], groups: dict[tuple[int, ...], ProcessGroup], watch: RankWatch
) -> list[ChunkExchange]:
    """One exchange for each group of peers, device and type, in the order in which the tensors need them."""
    found: dict[tuple[tuple[int, ...], torch.device, torch.dtype], list[Lending]] = {}
    for lending in (cover.lending() for entry in entries for cover in entry.cut_covers):
        if lending is not None:
            peers, tensor = lending.elsewhere.peers, lending.working
            found.setdefault((peers.ranks, tensor.device, tensor.dtype), []).append(lending)
            if peers.ranks not in groups:
                groups[peers.ranks] = peers.group()
    return [ChunkExchange(groups[ranks], lendings, watch) for (ranks, _, _), lendings in found.items()]
