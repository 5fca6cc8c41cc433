"""Stopping: a command that is told to end says so in a line, and leaves no process behind that it started."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import active_children
from typing import Any, NoReturn

_children: set[subprocess.Popen[Any]] = set()
_stopped = threading.Event()


class Stopped(BaseException):
    """Somebody wants this command to end: by Ctrl-C, or by SIGTERM, as `kill`, `timeout` and batch systems do."""


def run(main: Callable[[list[str]], int]) -> int:
    """Run a command; return its exit status, when it is stopped that of a shell.

    Not for what takes part in collectives: they hold up what Python does at a signal.

    Args:
        main: takes the command line, returns the exit status.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as that of what a shell runs in the background
            signal.signal(number, _stop)
    try:
        return main(sys.argv[1:])
    except Stopped as stopped:
        for process in active_children():  # which Python would wait for at its end
            process.terminate()
        return say_stopped(*stopped.args)


def say_stopped(number: signal.Signals) -> int:
    """Say it; return the exit status."""
    sys.stderr.write(f"stopped by {number.name}\n")  # at once: others may say the same
    return 128 + number


def _stop(number: int, _: object) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)  # who is not content with how long it takes may ask again
    _stopped.set()
    for child in list(_children):
        child.terminate()
    raise Stopped(signal.Signals(number))


@contextmanager
def child(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start a process, which ends with this one at the latest; wait for its end.

    It gets SIGTERM, which `torchrun` hands on. Any thread may start one.
    """
    with subprocess.Popen(command, **options) as process:
        _children.add(process)
        try:
            if _stopped.is_set():
                process.terminate()
            yield process
        except BaseException:
            process.terminate()
            raise
        finally:
            _children.discard(process)


def output(command: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a process to its end, and return what it wrote."""
    with child(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)
