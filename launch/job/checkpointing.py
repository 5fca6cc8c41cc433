"""The checkpoints of a run: complete or ignored, the last few kept, written while training goes on.

A checkpoint is a directory `step-00000120`, as `torch.distributed.checkpoint` writes it, with a manifest: the digest of
every file, and the options of the run. It is written under another name and renamed when all is on disk. So whatever
happens in between, what has the name is complete; and what a disk or a copy does to it later, the digests show.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save

from launch.job.identity import Identity, difference, of_version_1
from launch.job.world import UserError, World
from sm3_dist.checkpoint import CheckpointError, TrainState, load

MANIFEST = "manifest.json"
FORMAT_VERSION = 2


class Checkpoints:
    """Saves a training run, and brings it back. Every method is to be called on every rank.

    Args:
        path: the directory for all of them, which every rank sees; ``None``: none are written.
        state: what is saved.
        world: the processes that save it together.
        identity: what must be the same for a run to go on.
        keep: how many to keep, the last ones.
        say: tells the user something.
    """

    def __init__(
        self,
        path: Path | None,
        state: TrainState,
        world: World,
        identity: Identity,
        keep: int = 2,
        say: Callable[[str], None] = print,
    ) -> None:
        self.path, self.state, self.world, self.identity = path, state, world, identity
        self.keep, self.say = keep, say
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._group: dist.ProcessGroup | None = None
        self._writing: Future[None] | None = None
        self._written = state.step

    def resume(self) -> int:
        """Load the last checkpoint that is in order, and return its step; 0 if there is none at all.

        Raises:
            UserError: the checkpoint is that of another run or of a newer program, or there are some but all damaged.
        """
        found = self.world.agreed(lambda: complete(self.path))
        self.world.same("the list of complete checkpoints", [path.name for path in found])
        for path in reversed(found):
            problem = self._problem(path)
            if problem is None:
                try:
                    load({"train": self.state}, path)
                except CheckpointError as error:
                    raise UserError(str(error)) from error
                self._written = self.state.step
                self.say(f"resumed from {path} at step {self.state.step}")
                return self.state.step
            aside = path.with_suffix(".damaged")
            self.say(f"{path} is damaged and is not used: {problem}. It is now called {aside.name}")
            self.world.agreed(lambda path=path, aside=aside: self._put_aside(path, aside))  # type: ignore[misc]
        if found:
            raise UserError(
                f"none of the {len(found)} checkpoints in {self.path} is in order; restore one of them, or start anew "
                "with --overwrite and without --resume"
            )
        return 0

    def save(self) -> None:
        """Save the state as it is now. Returns when it is copied; a thread writes it while training goes on."""
        if self.path is None or self.state.step == self._written:
            return
        self.finish()
        if self._group is None:
            group = dist.new_group(backend="gloo")  # its own: training uses the others at the same time
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        stager = DefaultStager(StagingOptions(False, False, False, False))
        copy = stager.stage({"train": self.state.state_dict(cpu_offload=True)})
        assert not isinstance(copy, Future)
        self._written = self.state.step
        self._writing = self._writer.submit(self._write, copy, self.state.step)

    def finish(self) -> None:
        """Wait until the last one is written. If it could not be, say so: the one before it is still there."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except CheckpointException as error:
            _, (reason, _) = min(error.failures.items())
            self._failed(reason)
        except OSError as error:
            self._failed(error)

    def close(self) -> None:
        """Wait until the last one is written.

        Raises:
            UserError: on every rank, if the last one could not be written.
        """
        self.finish()
        self._writer.shutdown()
        if self.path is not None and self._written != self.state.step:
            raise UserError(f"the state after step {self.state.step} is not saved; free some space and resume the run")

    def _failed(self, reason: BaseException) -> None:
        self.say(f"the checkpoint of step {self._written} could not be written, older ones stay: {reason}")
        self._written = -1

    def _write(self, state: dict[str, Any], step: int) -> None:
        """Write, describe, rename, and remove what is no longer kept. In a thread; every rank does it."""
        assert self.path is not None
        final = self.path / f"step-{step:08d}"
        partial = final.with_suffix(".partial")
        try:
            self._together(lambda: self._make_room(partial, final))
            save(state, checkpoint_id=partial, process_group=self._group)
            files = self._together(lambda: {file.name: digest(file) for file in self._of_this_rank(partial)})
            manifest = {"format_version": FORMAT_VERSION, "step": step, "run": self.identity}
            manifest["files"] = {name: entry for each in files for name, entry in each.items()}
            self._together(lambda: self._complete_it(partial, final, manifest))
        except BaseException:
            if self.world.leads:
                _remove(partial)  # make room: the disk may be full
            raise

    def _make_room(self, partial: Path, final: Path) -> None:
        if self.world.leads:
            _remove(final, *partial.parent.glob("*.partial"))
            partial.mkdir(parents=True)

    def _complete_it(self, partial: Path, final: Path, manifest: dict[str, Any]) -> None:
        if self.world.leads:
            write_durably(partial / MANIFEST, json.dumps(manifest, indent=1))
            partial.rename(final)
            sync(final.parent)
            _remove(*complete(final.parent)[: -self.keep])

    def _put_aside(self, path: Path, aside: Path) -> None:
        if self.world.leads:
            try:
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            except OSError as error:
                raise UserError(f"cannot rename {path}: {error.strerror}") from error

    def _together(self, action: Callable[[], Any]) -> list[Any]:
        """What `action` returns on every rank; an OSError on one is raised on all, so that none waits for another."""
        try:
            result: Any = action()
        except OSError as error:
            result = error
        results = [None] * self.world.size
        dist.all_gather_object(results, result, group=self._group)
        for each in results:
            if isinstance(each, OSError):
                raise each
        return results

    def _of_this_rank(self, path: Path) -> list[Path]:
        files = sorted(path.glob(f"__{self.world.rank}_*"))
        return [*files, path / ".metadata"] if self.world.leads else files

    def _problem(self, path: Path) -> str | None:
        """What is wrong with a checkpoint's files; every rank looks at some of them.

        Raises:
            UserError: nothing is wrong, but it is not for this run.
        """
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            version, run, files = manifest["format_version"], manifest["run"], dict(manifest["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            return self._first_problem(f"its {MANIFEST} cannot be read ({error})")
        self.world.agreed(lambda: self._refuse_other_run(path, version, run))
        mine = sorted(files)[self.world.rank :: self.world.size]
        return self._first_problem(next(filter(None, (check(path / name, files[name]) for name in mine)), None))

    def _first_problem(self, problem: str | None) -> str | None:
        return next(filter(None, self.world.gather(problem)), None)

    def _refuse_other_run(self, path: Path, version: Any, run: Identity) -> None:
        if version not in (1, FORMAT_VERSION):
            raise UserError(
                f"{path} was written in version {version} of the format, and this program knows those up to "
                f"{FORMAT_VERSION}; resume with the program that wrote it"
            )
        differing = difference(of_version_1(run) if version == 1 else run, self.identity)
        if differing is not None:
            raise UserError(f"{path} belongs to another run: {differing}")


def complete(path: Path | None) -> list[Path]:
    """The complete checkpoints in a directory, from the first to the last."""
    if path is None:
        return []
    try:
        return sorted(each for each in path.glob("step-*") if not each.suffix and (each / MANIFEST).exists())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def digest(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    found, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
            size += len(block)
    return {"bytes": size, "sha256": found.hexdigest()}


def check(file: Path, wanted: dict[str, Any]) -> str | None:
    """What is wrong with a file of a checkpoint."""
    try:
        found = digest(file)
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
    if found == wanted:
        return None
    if found["bytes"] != wanted["bytes"]:
        return f"{file.name} has {found['bytes']} bytes instead of {wanted['bytes']}"
    return f"{file.name} has other contents than when it was written"


def write_durably(file: Path, text: str) -> None:
    with file.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    sync(file.parent)


def sync(directory: Path) -> None:
    """Make sure that the names in a directory are on disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(*paths: Path) -> None:
    """Remove checkpoints. First the manifest: half removed, they are none."""
    for path in paths:
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
