"""The identity of a run: what another must have in common with it to go on from its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from launch.job import recipe
from launch.job.options import Options, flag
from launch.job.settings import Settings

Identity = Mapping[str, Any]
"""Values that JSON knows, by name: those of options, and digests of the text and of the weights started from."""

CORPUS, START = "corpus", "start"


def identify(options: Options, settings: Settings, corpus: str, start: str | None = None) -> Identity:
    """All that the weights of a run depend on, but for how the ranks share the work.

    Args:
        options: what it was told to do.
        settings: of its optimizer.
        corpus: the digest of its text.
        start: the digest of the weights that it starts from; ``None``: those that ``--seed`` makes.
    """
    names = ("model", "optimizer", "steps", "batch_size", "seq_len", "schedule", "seed", "dtype", "clip_value")
    given = {name: getattr(options, name) for name in names} | {"recipe": recipe.which(options)}
    clip = str(options.clip_norm)  # JSON knows no infinity
    return given | asdict(settings) | {"clip": clip, CORPUS: corpus, START: start}


def of_version_1(saved: Identity) -> Identity:
    """What the first version of the format wrote, in today's terms.

    What the param groups of a checkpoint say is loaded with it, so a run goes on with the momenta that it had.
    """
    if saved.get("optimizer") == "sm3" and saved.get("recipe") is None:  # which stood for the default of its time
        saved = {**saved, "recipe": "adamw-like"}
    if saved.get("recipe") == "muon-like" and saved.get("momentum") == 0.9:  # which stood for none given
        saved = {**saved, "momentum": 0.95}
    return saved


def difference(saved: Identity, run: Identity) -> str | None:
    """In what a run differs from the one that a checkpoint is of, and what to do about it; ``None``: in nothing.

    Example:
        >>> difference({"lr": 0.004, "seed": 1, "rounding": None}, {"lr": 0.002, "seed": 1, "rounding": "nearest"})
        "lr was 0.004 and is 0.002; rounding was None and is 'nearest'. To go on with it pass --lr 0.004 and leave \
--rounding out; to start anew pass another --out"
    """
    differing = [name for name, value in run.items() if saved.get(name) != value]
    if not differing:
        return None
    listed = "; ".join(f"{name} was {saved.get(name)!r} and is {run[name]!r}" for name in differing)
    return f"{listed}. To go on with it {' and '.join(_to_do(saved, differing))}; to start anew pass another --out"


def _to_do(saved: Identity, differing: Sequence[str]) -> Iterator[str]:
    """What makes a run the same as a saved one, from which it differs in some values."""
    optimizer = recipe.RECIPES.get(saved.get("recipe", "")) or recipe.OPTIMIZERS.get(saved.get("optimizer", ""))
    unknown = optimizer.unknown if optimizer is not None else ()
    options = [name for name in differing if name not in (CORPUS, START)]
    left_out = [name for name in options if saved.get(name) is None or name in unknown]
    passed = [f"{flag(name)} {saved[name]}" for name in options if name not in left_out]
    if passed:
        yield f"pass {' '.join(passed)}"
    if left_out:
        yield f"leave {', '.join(map(flag, left_out))} out"
    if CORPUS in differing:
        yield "let --data be the text as it was"
    if START in differing and saved.get(START) is None:
        yield "leave --start-from out"
    elif START in differing:
        yield "let --start-from be the run as it was"
