"""Triton's interpreter, without what takes half of its time and changes nothing.

Each call of one kernel's function by another has it patch ``triton.language`` again, which once is enough for; and it
works out for every sum of integers whether it is too large, but does not look at the result unless it debugs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from triton.runtime import interpreter


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
