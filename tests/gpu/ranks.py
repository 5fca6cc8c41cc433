"""Runs the checks of on_device.py on every rank that torchrun started; rank 0 writes what failed, as JSON."""

from __future__ import annotations

import faulthandler
import json
import sys
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from on_device import CHECKS

from launch.job.leaving import leave
from launch.job.world import World, join


def main(file: str, wanted: str) -> None:
    with join() as world:
        failed = run(world, world.device(wanted))
        if world.leads:
            Path(file).write_text(json.dumps(failed))


def run(world: World, device: torch.device) -> dict[str, str]:
    """The checks by name, each with what it raised on some rank or with ``""``."""
    done: dict[str, str] = {}
    faulthandler.enable()
    for name, check in CHECKS.items():
        print(name, file=sys.stderr, flush=True)  # the last is what a process died of
        error = ""
        try:
            check(device)
        except Exception:
            error = traceback.format_exc()
        done[name] = next(filter(None, world.gather(error)), "")
    return done


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
