"""The states of the random number generators of all ranks, as text: reading it can run no code."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import warnings
from typing import Any

import torch
import torch.distributed as dist


def save_rng() -> list[str]:
    """The states of Python's and torch's generators (CPU, and this rank's CUDA device), by rank. A collective."""
    mine: dict[str, Any] = {"python": random.getstate(), "cpu": _encode(torch.get_rng_state())}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        mine["cuda"] = _encode(torch.cuda.get_rng_state())
    states = [json.dumps(mine)]
    if dist.is_initialized():
        states *= dist.get_world_size()
        dist.all_gather_object(states, json.dumps(mine))
    return states


def restore_rng(states: list[str]) -> None:
    """Continue the random numbers where they were saved.

    With another number of ranks there is nothing to continue: each rank is then seeded anew, from the saved states and
    its number, and rank 0 warns.

    Args:
        states: what :func:`save_rng` returned.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if len(states) != world:
        if rank == 0:
            warnings.warn(
                f"the checkpoint has random states of {len(states)} ranks, and there are {world} now: every rank is "
                "seeded anew. Dropout and the like differ from what they would have been.",
                stacklevel=2,
            )
        seed = int.from_bytes(hashlib.sha256(f"{states[0]} {rank} {world}".encode()).digest()[:8], "big") >> 1
        torch.manual_seed(seed)
        random.seed(seed)
        return
    mine = json.loads(states[rank])
    version, internal, gauss = mine["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(_decode(mine["cpu"]))
    if "cuda" in mine and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(mine["cuda"]))


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
