"""Leaving: how a process of a run ends, after a good run and after a mistake of the user."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from typing import NoReturn

import torch.distributed as dist

# $0 is the agent, $1 the line. Whoever started the agent may read what it says to the end before asking for its status:
# until then it is a zombie.
STOP_AND_SAY = r"""
kill -TERM "$0"
tries=0
while kill -0 "$0" && ! grep -q "^State:.*Z" "/proc/$0/status" && [ $tries -lt 600 ]; do
    sleep 0.1
    tries=$((tries + 1))
done 2>/dev/null
printf '%s\n' "$1" >&2
"""


def leave(status: int) -> NoReturn:
    """End this process without finalizing the interpreter, once everything that it said is written.

    A worker thread of gloo may still hold the tensor of a collective that has ended. To drop it the thread needs the
    interpreter; if that is finalizing, Python ends the thread, which C++ takes for an error: "terminate called without
    an active exception", and a run that went well dies with SIGABRT. That happens with any optimizer. Files are closed
    and process groups left by now, so nothing is lost by going at once.

    Args:
        status: exit status.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def under_torchrun() -> bool:
    """Whether an agent of torchrun watches this process, and would start it again."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def stop_agent(line: str, local_rank: int) -> None:
    """Let torchrun end instead of starting the processes of this machine again, and ``line`` be the last on the screen.

    ``--max-restarts`` makes no difference between a machine that was lost and a mistake in the options, which would be
    the same a hundred times. Its agent can be told by a signal alone, and then writes a traceback: so a process that
    outlives it says the line once more. Its exit status is 1. To be called on every rank.

    Args:
        line: what is wrong and what to do.
        local_rank: number of this process on its machine.
    """
    if under_torchrun():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the agent sends it on; ranks leave together nevertheless
        dist.barrier()
        if local_rank == 0:
            subprocess.Popen(["/bin/sh", "-c", STOP_AND_SAY, str(os.getppid()), line], start_new_session=True)
