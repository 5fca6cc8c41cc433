"""The options of a training run: one field each. `command_line.py` makes the command line of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch.job.corpus import is_hidden
from launch.job.world import UserError


def option(default: Any, help: str, *, type: Any = None, choices: Sequence[str] | None = None) -> Any:
    """Describe one option, as a dataclass field; without ``type`` it has that of its default.

    The names that some options choose from are keys of tables in other files, and stand in `command_line.py`.
    """
    return field(default=default, metadata={"help": help, "type": type or default.__class__, "choices": choices})


@dataclass(frozen=True)
class Options:
    """What `launch/train.py --help` lists."""

    model: str = option("small", "size of the model")
    optimizer: str = option("sm3", "what takes the steps")
    recipe: str | None = option(
        None,
        "how to use sm3; default: muon-like, but adamw-like with --parallel fsdp1-flat, fairscale, or "
        "--step-in-backward, where muon-like cannot be",
        type=str,
    )
    parallel: str = option("auto", "how ranks share the work; auto: fsdp2, or none for a single process")
    steps: int = option(600, "optimizer steps")
    batch_size: int = option(16, "sequences per step, over all ranks")
    seq_len: int = option(128, "bytes per sequence; the gpt2 model is GPT-2's 124 M parameters at 1024")
    lr: float | None = option(None, "learning rate; default: the best found for the optimizer", type=float)
    momentum: float | None = option(
        None, "momentum (adamw: beta1; muon-like: of the matrices alone); default: the optimizer's", type=float
    )
    beta: float | None = option(
        None, "decay of the squared gradients (adamw: beta2), for sm3 0 sums them; default: the optimizer's", type=float
    )
    weight_decay: float = option(0.0, "decoupled weight decay")
    cover_block: int | None = option(
        None, "sm3: elements of a row that one entry of its state covers; default: the recipe's", type=int
    )
    dtype: str = option("float32", "type of the weights, and of what is computed", choices=["float32", "bfloat16"])
    rounding: str | None = option(
        None,
        "sm3: how weights and momentum are rounded to bfloat16 (default: stochastic); int8 always stochastically",
        type=str,
        choices=["stochastic", "nearest"],
    )
    momentum_dtype: str | None = option(
        None, "sm3: type of the momentum (default: float32)", type=str, choices=["float32", "bfloat16", "int8"]
    )
    step_in_backward: bool = option(
        False, "sm3 with none, fsdp2, hsdp or tp: use each gradient as soon as it is there, and free it"
    )
    schedule: str = option("paper", "learning rate after its warm-up")
    clip: float | None = option(
        None,
        "largest norm of the whole gradient; inf: no clipping (default: 1; with --step-in-backward inf)",
        type=float,
    )
    clip_value: float | None = option(
        None, "with --step-in-backward: largest element of the gradient; default: no clipping", type=float
    )
    data: Path | None = option(None, "file or directory to train on; default: Python's standard library", type=Path)  # noqa: RUF009
    held_out_bytes: int | None = option(None, "judge on so many of the bytes held out; default: all", type=int)
    start_from: Path | None = option(  # noqa: RUF009
        None, "start from the last weights of another run, the --out of which this is; default: at random", type=Path
    )
    out: Path | None = option(None, "directory for configuration, metrics and picture; default: none", type=Path)  # noqa: RUF009
    overwrite: bool = option(False, "replace a run that --out already holds")
    log_every: int = option(10, "steps between two lines of the metrics")
    checkpoint_every: int | None = option(
        None, "save to OUT/checkpoints after so many steps, and at the end; default: never", type=int
    )
    keep: int = option(2, "how many checkpoints to keep")
    resume: str = option("no", "auto: go on from the last complete checkpoint in OUT", choices=["no", "auto"])
    seed: int = option(0, "which random weights to start from and which order of the data")
    device: str = option("auto", "auto: CUDA where there is any", choices=["auto", "cpu", "cuda"])
    reshard: bool = option(
        False, "fsdp1, fsdp2, hsdp, fairscale: drop gathered weights after forward; slower, less memory"
    )
    replicas: int = option(2, "hsdp: copies of the model, each sharded over world / copies ranks")
    tp_size: int | None = option(None, "tp: ranks that share each layer; default: all", type=int)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "replicas", "keep", "log_every"):
            require(getattr(self, name) >= 1, f"{flag(name)} {getattr(self, name)} must be at least 1")
        for name in ("tp_size", "held_out_bytes", "cover_block", "checkpoint_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{flag(name)} {value} must be at least 1")
        require(0 <= self.seed < 2**63, f"--seed {self.seed} must be at least 0 and less than 2^63")
        saves = self.checkpoint_every is not None or self.resume == "auto"
        require(not saves or self.out is not None, "--checkpoint-every and --resume need --out DIRECTORY")
        require(
            not (self.overwrite and self.resume == "auto"), "--overwrite starts anew and --resume goes on; pass one"
        )
        if self.start_from is not None and self.out is not None:
            same = self.start_from.resolve() == self.out.resolve()
            require(
                not same, f"--start-from {self.start_from} is --out: name another directory for what this run writes"
            )
        require(
            not self._reads_what_it_writes,
            f"--out {self.out} is within --data {self.data}: what this run writes would be text of the next, and of "
            "itself when it is resumed; name a directory outside, or one with a dot before its name, which is not read",
        )
        require(
            self.clip is None or self.clip > 0,
            f"--clip {self.clip} must be greater than 0; pass inf to switch clipping off",
        )
        require(
            not (self.step_in_backward and math.isfinite(self.clip_norm)),
            f"--clip {self.clip} needs the norm of the whole gradient, which --step-in-backward never has: each "
            "gradient is used and freed before the next is there. Pass --clip-value, which cuts off its elements, or "
            "leave clipping out; the adamw-like recipe cuts off long elements of updates (update_rms)",
        )
        require(
            self.clip_value is None or (self.step_in_backward and self.clip_value > 0),
            f"--clip-value {self.clip_value} must be greater than 0, and is for --step-in-backward",
        )

    @property
    def _reads_what_it_writes(self) -> bool:
        if self.data is None or self.out is None:
            return False
        data, out = self.data.resolve(), self.out.resolve()
        return out.is_relative_to(data) and not is_hidden(out.relative_to(data))

    @property
    def clip_norm(self) -> float:
        """The largest norm of the gradient: ``clip``, or what it stands for."""
        if self.clip is not None:
            return self.clip
        return math.inf if self.step_in_backward else 1.0

    def as_json(self) -> dict[str, Any]:
        """Return the options as values that JSON knows."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
