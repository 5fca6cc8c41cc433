"""Machine code of the loops of the C kernel: instructions per element, for each width of vectors.

Needs a C compiler and objdump, and no processor that has the vectors. Counted is what is executed once around the
innermost loop, in the usual case: work of the group before is under way, and no number is NaN.
Each kind is compiled alone, as the function of its own that it is in the library.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launch.benchmarks.machine_code import Function, Instruction, Weight
from launch.job.world import UserError

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "sm3_dist" / "kernels" / "c"
WIDTHS = {"avx2": '"avx2"', "avx512": "AVX512"}
"""Of vectors; what the compiler is told of each, in the terms of widths.h."""

SOURCE = """
#include <string.h>
#include "elements.h"
#include "settings.h"
#include "tensors.h"
#include "widths.h"

__attribute__((target({target}))) {function}
"""
PLAIN = """int32_t counted(ROW_ARGUMENTS) {{
    return row_of({weight}, {weight}, {moment}, 1, n, w, g, m, floor, floors, peaks, s);
}}"""
RECIPE = """void counted(struct stretch *x) {{
    step_groups_{width}({weight}, {weight}, {moment}, x);
}}"""

ASKED = """
import json
import setuptools
from distutils.ccompiler import new_compiler
from distutils.core import run_setup
from distutils.sysconfig import customize_compiler

compiler = new_compiler()
customize_compiler(compiler)
(library,) = run_setup("setup.py", stop_after="config").ext_modules
print(json.dumps([*compiler.compiler_so, *library.extra_compile_args]))
"""
"""How setup.py compiles the library."""


@dataclass(frozen=True)
class Kind:
    """What is compiled.

    Attributes:
        function: whose code is looked at.
        weight: type of weights and gradients.
        moment: type of momentum.
        is_random: whether weights and momentum are rounded stochastically.
        most: instructions per element that gcc may need for each width; and those on vectors that are no moves.
    """

    function: str
    weight: str
    moment: str
    is_random: bool
    most: tuple[tuple[float, float], ...]


STOCHASTIC = "recipe, bfloat16 rounded stochastically, 8-bit momentum"
KINDS = {
    "float32": Kind(PLAIN, "FLOAT32", "NONE", False, ((2.5, 1.6), (1.25, 0.8))),
    "bfloat16": Kind(PLAIN, "BFLOAT16", "NONE", False, ((4.2, 3.5), (1.9, 1.57))),
    "float32, momentum": Kind(PLAIN, "FLOAT32", "FLOAT32", False, ((3.0, 1.95), (1.5, 0.97))),
    "recipe, float32, float32 momentum": Kind(RECIPE, "FLOAT32", "FLOAT32", False, ((5.9, 3.75), (2.75, 1.7))),
    "recipe, bfloat16, bfloat16 momentum": Kind(RECIPE, "BFLOAT16", "BFLOAT16", False, ((9.8, 6.6), (4.7, 2.3))),
    STOCHASTIC: Kind(RECIPE, "BFLOAT16", "CODE", True, ((12.9, 8.5), (5.6, 3.25))),
}


@dataclass(frozen=True)
class Code:
    """What the compiler made of a loop.

    Attributes:
        way: what is executed once around it.
    """

    way: tuple[Instruction, ...]

    @property
    def elements(self) -> int:
        """How many are worked on once around: each has one square root."""
        return sum(each.roots for each in self.way)

    @property
    def per_element(self) -> dict[str, float]:
        """Instructions: all; those on vectors; of these what is no move; all that read memory; all that write it."""
        counts = {
            "instructions": len(self.way),
            "on vectors": sum(each.is_vector for each in self.way),
            "of these no moves": sum(each.is_vector and not each.is_move for each in self.way),
            "loads": sum(each.loads for each in self.way),
            "stores": sum(each.stores for each in self.way),
        }
        return {name: count / self.elements for name, count in counts.items()}


def command() -> list[str]:
    """How the library is compiled.

    Raises:
        UserError: there is no compiler, no objdump, or no x86-64.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        raise UserError(f"the loops that are counted are for x86-64, and this is {platform.machine()}")
    words: list[str] = json.loads(_said(sys.executable, "-c", ASKED).splitlines()[-1])
    for tool in (words[0], "objdump"):
        if not shutil.which(tool):
            raise UserError(f"counting instructions needs a C compiler and objdump, and there is no {tool}")
    return words


def version(words: list[str]) -> str:
    """What the compiler of a command calls itself."""
    return _said(words[0], "--version").splitlines()[0]


def function(name: str, width: str, words: list[str]) -> Function:
    """Compile one of ``KINDS``."""
    kind = KINDS[name]
    text = kind.function.format(width=width, weight=kind.weight, moment=kind.moment)
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "counted.c", Path(folder) / "counted.o"
        source.write_text(SOURCE.format(target=WIDTHS[width], function=text))
        _said(*words, f"-I{SOURCES}", "-c", str(source), "-o", str(made))
        return Function(_said("objdump", "-d", "--no-show-raw-insn", "--disassemble=counted", str(made)))


def compiled(name: str, width: str, words: list[str]) -> Code:
    """The loop of one of ``KINDS``."""
    kind, code = KINDS[name], function(name, width, words)

    def usual(each: Instruction) -> Weight:
        """Weights are written, as they are if work is under way; random bits are read or not; nothing else is done."""
        loads = each.loads and not each.is_local
        return int(each.stores and not each.is_local), int(loads) if kind.is_random else -int(loads), -1

    codes = [Code(tuple(code.way(loop, usual))) for loop in code.innermost_loops()]
    return max(codes, key=lambda each: (each.elements, -len(each.way)))


def rows(names: Iterable[str], words: list[str]) -> list[list[str]]:
    """The table of some of ``KINDS``, its header first."""
    lines = []
    for name in names:
        figures = [compiled(name, width, words).per_element for width in WIDTHS]
        lines.append([name, *(", ".join(f"{each[column]:.2f}" for each in figures) for column in figures[0])])
    return [[", ".join(WIDTHS), "instructions per element", *list(figures[0])[1:]], *lines]


def _said(*words: str) -> str:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{words[0]} failed: {(done.stderr.strip() or 'it does not say why').splitlines()[-1]}")
    return done.stdout
