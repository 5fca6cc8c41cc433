"""Trains in one framework on every rank that torchrun started, as tests/frameworks do; ranks write what differed."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs" / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "frameworks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.job.leaving import leave
from sm3_dist import MuonLikeSM3

PATIENCE = 60  # seconds for all cases of a framework; then the stacks are written

# Arguments of against_a_plain_loop in tests/frameworks.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "accelerate": {
        "DDP": {"fsdp": None, "clip": None, "interrupt": True},
        "FSDP1": {"fsdp": 1, "clip": None, "interrupt": False},  # accelerate loads no optimizer there
        "FSDP2": {"fsdp": 2, "clip": None, "interrupt": True},
        "FSDP2, orthogonal": {"fsdp": 2, "clip": None, "interrupt": True, "recipe": MuonLikeSM3},
    },
    "lightning": {"FSDPStrategy": {"options": {}, "sharded": True}},
    "transformers": {"DDP": {"fsdp": None}, "FSDP2": {"fsdp": 2}},
}


def main(framework: str, folder: Path, device: str = "cuda") -> None:
    """Write what went wrong, by case, with ``""`` for nothing; after each case, for the next one may hang."""
    repeatable()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    done: dict[str, str] = {}
    for case in CASES[framework]:
        done[case] = differences(framework, case, folder, device)
        (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(done))


def repeatable() -> None:
    """Have the same gradients where the same is computed, whatever memory the weights lie in."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["DISABLE_ADDMM_CUDA_LT"] = (
        "1"  # it chooses kernels by addresses, and FSDP1's flat parameters have others
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def differences(framework: str, case: str, folder: Path, device: str) -> str:
    """In which weights the case differs from a plain loop, and after a break from itself; or what it raised."""
    module = importlib.import_module(f"test_{framework}")
    try:
        plain, resumed = module.against_a_plain_loop(
            folder=folder / case.replace(", ", "-"), device=device, **CASES[framework][case]
        )
    except Exception:
        return traceback.format_exc()
    return f"from a plain loop: {plain}; after a break: {resumed}" if plain or resumed else ""


if __name__ == "__main__":
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    main(sys.argv[1], Path(sys.argv[2]))
    if dist.is_initialized():  # by the framework
        dist.destroy_process_group()
    leave(0)
