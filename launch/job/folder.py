"""The folder of a run: `--out`, with its configuration, metrics and picture."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from launch.job.world import UserError

CONFIG, METRICS, PICTURE, CHECKPOINTS = "config.json", "metrics.jsonl", "loss.png", "checkpoints"


class Folder:
    """Where rank 0 writes. Without a path nothing is written, so callers need not ask.

    Args:
        path: the directory, or ``None``.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []

    @classmethod
    def claim(cls, path: Path, overwrite: bool) -> Folder:
        """Make the directory ready for a new run. Nothing is touched unless everything is in order.

        Args:
            path: the directory, which may exist.
            overwrite: whether to remove the run that it holds; other files in it always stay.

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
                shutil.rmtree(file) if file.is_dir() else file.unlink()
            (path / METRICS).touch()
        except OSError as error:
            raise UserError(f"--out {path} cannot be written to: {error.strerror}") from error
        return cls(path)

    @classmethod
    def go_on(cls, path: Path, step: int) -> Folder:
        """Go on with the run that the directory holds, from ``step``: what it wrote of later steps is forgotten.

        Args:
            path: the directory, which may exist.
            step: number of steps taken; 0 for a new run.

        Raises:
            UserError: it cannot be written to.
        """
        folder = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lines = (path / METRICS).read_text().splitlines() if (path / METRICS).exists() else []
            folder.records = [record for record in map(parse, lines) if record and record["step"] <= step]
            kept = "".join(json.dumps(record) + "\n" for record in folder.records)
            (path / METRICS).with_suffix(".new").write_text(kept)
            (path / METRICS).with_suffix(".new").replace(path / METRICS)
        except OSError as error:
            raise UserError(f"--out {path} cannot be written to: {error.strerror}") from error
        return folder

    def configure(self, config: dict[str, Any]) -> None:
        """Write the configuration."""
        if self.path:
            (self.path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to the metrics."""
        self.records.append(record)
        if self.path:
            with (self.path / METRICS).open("a") as metrics:
                metrics.write(json.dumps(record) + "\n")

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


def parse(line: str) -> dict[str, Any] | None:
    """Return a line of the metrics; ``None`` if it was cut off, or is the end of a run."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if "train_bits_per_byte" in record else None
