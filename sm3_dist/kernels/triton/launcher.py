"""Launcher: what launches a kernel for the second time and on, in a few microseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

UNFUSED: Mapping[str, Any] = {"enable_fp_fusion": False}


class Launcher:
    """Launches one kernel on one device, always with the same constants and types of arguments.

    Triton looks at every argument and option of every launch to find the machine code, which takes longer than many a
    kernel runs. Here the code is kept that the first launch has found.
    """

    def __init__(self) -> None:
        self._compiled: Any = None

    def __call__(
        self,
        kernel: Any,
        programs: int,
        arguments: Sequence[Any],
        constants: Sequence[Any] = (),
        options: Mapping[str, Any] = UNFUSED,
    ) -> None:
        """Launch it.

        Args:
            kernel: what the programs run.
            programs: how many.
            arguments: of the kernel.
            constants: those that are compiled in, after the others.
            options: for the compiler.
        """
        if self._compiled is None:  # the interpreter has none
            self._compiled = kernel[(programs,)](*arguments, *constants, **options)
        else:
            self._compiled[(programs, 1, 1)](*arguments, *constants)
