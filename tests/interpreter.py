"""Triton's interpreter, with the minima of GPUs, and without what takes half of its time and changes nothing.

Up to Triton 3.7 it has NaN for the minimum of NaN and a number, also where a kernel does not ask for that. Each call of
one kernel's function by another has it patch ``triton.language`` again, which once is enough for; and it works out for
every sum of integers whether it is too large, but does not look at the result unless it debugs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from triton.runtime import interpreter


def mend() -> None:
    """Let minima and maxima in this process be numbers wherever one of the two is; later releases have them so."""
    interpreter.InterpreterBuilder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    interpreter.InterpreterBuilder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)


def hurry() -> None:
    """Let the interpreter of this process, which must have been asked for, do each of these things once or never."""
    interpreter.InterpretedFunction.__call__ = _call
    options = interpreter.interpreter_builder.options
    assert not options.debug  # else overflows are looked at
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)


_patched: set[int] = set()


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function from a kernel; those of a module see the same ``triton.language``."""
    if id(self.fn.__globals__) not in _patched:
        _patched.add(id(self.fn.__globals__))
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)
