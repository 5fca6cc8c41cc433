"""Resident memory of processes: how many bytes of RAM they occupy, as Linux tells it in /proc."""

from __future__ import annotations

from pathlib import Path

from launch.job.world import UserError


def resident(process: int | str = "self") -> int:
    """Return the resident bytes of a process now; 0 if it has ended."""
    return status(process).get("VmRSS", 0)


def peak() -> int:
    """Return the most bytes that this process has had resident since :func:`forget_peak`, as the kernel counted."""
    return status("self")["VmHWM"]


def forget_peak() -> None:
    """Let :func:`peak` start from what is resident now.

    Raises:
        UserError: the kernel does not let us.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise UserError(
            f"cannot reset the peak of resident memory, which takes Linux and its /proc: {error}"
        ) from error


def status(process: int | str) -> dict[str, int]:
    """Return what /proc says of the memory of a process, in bytes."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has ended
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: 1024 * int(value.removesuffix("kB")) for name, value in pairs}
