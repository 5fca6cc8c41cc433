"""The folder of a run: `--out`, with its configuration, metrics and picture."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.job import records
from launch.job.world import UserError

CONFIG, METRICS, PICTURE, CHECKPOINTS = "config.json", "metrics.jsonl", "loss.png", "checkpoints"


class Folder:
    """Where rank 0 writes. Without a path nothing is written, so callers need not ask.

    Args:
        path: the directory, or ``None``.
        say: tells the user something.
    """

    def __init__(self, path: Path | None = None, say: Callable[[str], None] = print) -> None:
        self.path, self.say = path, say
        self.records: list[dict[str, Any]] = []
        self._unwritten: list[dict[str, Any]] = []

    @classmethod
    def claim(cls, path: Path, overwrite: bool, say: Callable[[str], None] = print) -> Folder:
        """Make the directory ready for a new run. Nothing is touched unless everything is in order.

        Args:
            path: the directory, which may exist.
            overwrite: whether to remove the run that it holds; other files in it always stay.
            say: tells the user something.

        Raises:
            UserError: it holds a run and ``overwrite`` is false, it cannot be written to, or matplotlib is missing.
        """
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("--out draws a picture with matplotlib, which is missing; pip install matplotlib")
        try:
            held = [path / name for name in (CONFIG, METRICS, PICTURE, CHECKPOINTS) if (path / name).exists()]
            if held and not overwrite:
                names = ", ".join(file.name for file in held)
                raise UserError(f"--out {path} already holds a run ({names}); choose another, or pass --overwrite")
            path.mkdir(parents=True, exist_ok=True)
            for file in held:
                remove(file)
            (path / METRICS).touch()
        except OSError as error:
            raise UserError(f"--out {path} cannot be written to: {error.strerror}") from error
        return cls(path, say)

    @classmethod
    def go_on(cls, path: Path, step: int, say: Callable[[str], None] = print) -> Folder:
        """Go on with the run that the directory holds, from ``step``: what it wrote of later steps is forgotten.

        Args:
            path: the directory, which may exist.
            step: number of steps taken; 0 for a new run.
            say: tells the user something.

        Raises:
            UserError: it cannot be written to, or holds a run that has ended and left no checkpoint.
        """
        folder = cls(path, say)
        try:
            path.mkdir(parents=True, exist_ok=True)
            held = records.read(path / METRICS)
            if step == 0 and any("validation_bits_per_byte" in record for record in held):
                raise UserError(
                    f"--out {path} holds a run that has ended and left no checkpoint to go on from; choose another, "
                    "or pass --overwrite in place of --resume"
                )
            folder.records = [each for each in held if "train_bits_per_byte" in each and each["step"] <= step]
            kept = "".join(json.dumps(record) + "\n" for record in folder.records)
            (path / METRICS).with_suffix(".new").write_text(kept)
            (path / METRICS).with_suffix(".new").replace(path / METRICS)
        except OSError as error:
            raise UserError(f"--out {path} cannot be written to: {error.strerror}") from error
        return folder

    def configure(self, config: dict[str, Any]) -> None:
        """Write the configuration.

        Raises:
            UserError: it cannot be written.
        """
        if self.path:
            try:
                (self.path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            except OSError as error:
                raise UserError(f"--out {self.path} cannot be written to: {error.strerror}") from error

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to the metrics. If that cannot be, say so, and write it together with the next one."""
        self.records.append(record)
        if self.path:
            self._unwritten.append(record)
            try:
                records.append(self.path / METRICS, *self._unwritten)
                self._unwritten.clear()
            except OSError as error:
                if len(self._unwritten) == 1:
                    self.say(f"{self.path / METRICS} cannot be written to, training goes on: {error.strerror}")

    def finish(self, validation: float, baselines: dict[str, float]) -> None:
        """Draw the picture.

        Raises:
            UserError: it could not be written, or the metrics not all.
        """
        try:
            self.draw(validation, baselines)
        except OSError as error:
            raise UserError(f"{PICTURE} could not be written to --out {self.path}: {error.strerror}") from error
        if self._unwritten:
            raise UserError(f"{METRICS} in --out {self.path} lacks the last {len(self._unwritten)} line(s)")

    def draw(self, validation: float, baselines: dict[str, float]) -> None:
        """Draw the logged training loss, the final validation and the baselines, all in bits per byte."""
        if self.path is None:
            return
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        trained = [record for record in self.records if "train_bits_per_byte" in record]
        steps = [record["step"] for record in trained]
        axes.plot(steps, [record["train_bits_per_byte"] for record in trained], label="training")
        axes.plot(steps[-1:], [validation], "o", label=f"validation: {validation:.3f}")
        for number, (name, bits) in enumerate(baselines.items()):
            axes.axhline(bits, color="grey", linestyle=("--", ":", "-.")[number % 3], label=f"{name}: {bits:.3f}")
        axes.set(xlabel="step", ylabel="bits per byte")
        axes.legend()
        figure.savefig(self.path / PICTURE, dpi=120)
        pyplot.close(figure)


def remove(file: Path) -> None:
    """Remove a file, or a directory; of one that lies elsewhere, on a larger disk say, the checkpoints alone."""
    if not file.is_dir():
        file.unlink()
    elif file.is_symlink():
        for checkpoint in file.glob("step-*"):
            shutil.rmtree(checkpoint)
    else:
        shutil.rmtree(file)
