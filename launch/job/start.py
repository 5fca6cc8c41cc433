"""Where a run starts: at the weights that another run ended with, which is fine-tuning."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from launch.job.checkpointing import MANIFEST, check, complete
from launch.job.folder import CHECKPOINTS
from launch.job.world import UserError, World
from sm3_dist.checkpoint import CheckpointError, get_state_dict, load, set_state_dict


@dataclass(frozen=True)
class Start:
    """The last checkpoint of another run.

    Args:
        path: its directory.
        digest: a short name for exactly these weights, as they were written.
    """

    path: Path
    digest: str

    @classmethod
    def of(cls, run: Path, world: World) -> Start:
        """Find it, and see that its files are as they were written. Call it on every rank.

        Args:
            run: the directory that was the other run's ``--out``.
            world: the processes that start.

        Raises:
            UserError: on every rank, if there is none or it is damaged.
        """
        start, files = world.agreed(lambda: cls._read(run))
        world.same("the checkpoint to start from", start.digest)
        mine = sorted(files)[world.rank :: world.size]
        world.agreed(lambda: _refuse_damage(start.path, {name: files[name] for name in mine}))
        return start

    @classmethod
    def _read(cls, run: Path) -> tuple[Start, dict[str, dict[str, object]]]:
        found = complete(run / CHECKPOINTS)
        if not found:
            raise UserError(
                f"--start-from {run}: there is no complete checkpoint in {run / CHECKPOINTS}; name the --out of a run "
                "that was told --checkpoint-every"
            )
        try:
            files = dict(json.loads((found[-1] / MANIFEST).read_text())["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--start-from {run}: {found[-1] / MANIFEST} cannot be read ({error})") from error
        return cls(found[-1], hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]), files

    def load(self, model: nn.Module) -> None:
        """Give a model, wrapped or not, these weights. Call it on every rank.

        Raises:
            UserError: on every rank, if they are those of another model.
        """
        weights, _ = get_state_dict(model, ())
        try:
            load({"train": {"model": weights}}, self.path)
        except CheckpointError as error:
            raise UserError(f"--start-from: {error}; --model and --seq-len must be those of that run") from error
        set_state_dict(model, (), model_state_dict=weights, optim_state_dict={})


def _refuse_damage(path: Path, files: dict[str, dict[str, object]]) -> None:
    for name, entry in files.items():
        problem = check(path / name, entry)
        if problem is not None:
            raise UserError(f"--start-from: {path} is damaged: {problem}; remove it to start from the one before it")
