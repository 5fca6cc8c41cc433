"""Machine code of the Triton kernel of matrices, or of the C kernel: instructions per element. Needs no GPU.

A program walks down a strip of rows, and a thread takes 16 bytes of the weight each time around: 4 elements in float32,
8 in bfloat16. Counted are the instructions of this loop per element, and those before and after it, slow paths that
are hardly ever taken included, which a strip of 64 rows executes at most once.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.benchmarks import cpu_code

ARCHITECTURES = (80, 90, 100)
PLAIN = {"AVERAGE": False, "SQUARES": 0, "NESTEROV": False, "PRODUCT": False, "GROUPS": 1, "SIDE": 128}
PLAIN |= {"BLOCK": False, "ASIDE": True, "RANDOM": False}
RECIPE = {"AVERAGE": True, "SQUARES": 32, "NESTEROV": True, "PRODUCT": True, "GROUPS": 2, "SIDE": 64}
RECIPE |= {"BLOCK": True, "ASIDE": False, "RANDOM": False}
RANDOM = RECIPE | {"RANDOM": True}
KINDS: dict[str, tuple[str, str | None, dict[str, Any], int, float]] = {
    # weight, momentum, options; most instructions per element in the loop; least occupancy
    "float32": ("float32", None, PLAIN, 35, 0.5),
    "bfloat16": ("bfloat16", None, PLAIN, 33, 0.5),
    "float32, momentum": ("float32", "float32", PLAIN, 40, 0.5),
    "recipe, float32, float32 momentum": ("float32", "float32", RECIPE, 50, 0.5),
    "recipe, bfloat16, bfloat16 momentum": ("bfloat16", "bfloat16", RECIPE, 48, 0.39),
    "recipe, bfloat16 rounded stochastically, 8-bit momentum": ("bfloat16", "int8", RANDOM, 82, 0.32),
}


@dataclass(frozen=True)
class Code:
    """What the compiler made of a kernel.

    Attributes:
        elements: that a thread takes each time around the loop.
        loop: instructions of the loop.
        others: instructions before and after it.
        registers: of a thread.
        spilled: bytes of a thread's registers that go to memory.
        operations: how often each instruction is there, with its modifiers.
        calls: functions that it calls.
        arithmetic: floating-point operations of the intermediate code.
    """

    elements: int
    loop: int
    others: int
    registers: int
    spilled: int
    operations: Counter[str]
    calls: frozenset[str]
    arithmetic: frozenset[str]

    @property
    def per_element(self) -> float:
        """Instructions of the loop per element."""
        return self.loop / self.elements

    @property
    def occupancy(self) -> float:
        """Part of the warps of a processor that find room: of 64, where a program is one warp and there are 32."""
        return min(32, 65536 // (32 * -(-self.registers // 8) * 8)) / 64


def compiled(name: str, architecture: int) -> Code:
    """Compile one of ``KINDS``."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sm3_dist.kernels.triton import matrix, values
    from sm3_dist.kernels.triton.work_list import options_of

    weight, moment, options, _, _ = KINDS[name]
    thread = 4 if weight == "float32" else 8
    constants = {
        "WEIGHT": getattr(tl, weight),
        "GRAD": getattr(tl, weight),
        "MOMENT": None if moment is None else getattr(tl, moment),
        "UNSCALED": False,
        "NORMAL_RANGE": True,
        "TALL": 32 * thread // 128,
        "VECTOR": thread,
        "TABLE": False,
        **options,
    }
    arguments = [name for name in matrix.step_strip.arg_names if name not in constants]
    types = {"strips": "*i32", "counts": "*i32", "matrices": "*i64", "addresses": "*i64"}
    types |= {"settings": "*fp32", "factors": "*fp32"} | dict.fromkeys(values.SEED, "i32")
    signature = {name: types.get(name, "fp32") for name in arguments} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(matrix.step_strip, signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options_of(thread, constants))
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        text = _said(tools / "nvdisasm", "-c", cubin.name)
        usage = _said(tools / "cuobjdump", "--dump-resource-usage", cubin.name)
    found = re.search(r"Function step_strip:\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    labels, instructions = _read(text)
    operations = Counter(name for name, _ in instructions)
    loop = max(number + 1 - labels.get(to, number + 1) for number, (_, to) in enumerate(instructions))
    names = r"\b(?:fma|mad|div|sqrt|rsqrt|rcp|mul|add|sub)\.[\w.]*f32"
    return Code(
        thread,
        loop,
        len(instructions) - loop,
        int(found[1]),
        int(found[2]) + int(found[3]),
        operations,
        frozenset(re.findall(r"\$__internal_\d+_\$(\w+)", text)),
        frozenset(each.removesuffix(".f32") for each in re.findall(names, made.asm["ptx"])),
    )


def _read(text: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Of each label the number of the instruction behind it, and of each instruction its name and where it goes."""
    labels: dict[str, int] = {}
    instructions: list[tuple[str, str]] = []
    for line in text.splitlines():
        if (label := re.match(r"(\.L_x_\d+):", line)) is not None:
            labels[label[1]] = len(instructions)
        elif (found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^\s;]+)(.*)", line)) and found[1] != "NOP":
            target = re.search(r"`\((\.L_x_\d+)\)", found[2]) if found[1].startswith("BRA") else None
            instructions.append((found[1], "" if target is None else target[1]))
    return labels, instructions


def _said(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: the C kernel (default: cuda)")
    parser.add_argument("--sm", type=int, nargs="+", default=list(ARCHITECTURES), help="GPUs (default: 80 90 100)")
    kinds = f"default: {', '.join(map(repr, KINDS))}"
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND", help=kinds)


def run(options: argparse.Namespace) -> None:
    """Compile, and print a Markdown table."""
    if options.device == "cpu":
        command = cpu_code.command()
        print(f"{cpu_code.version(command)}\n")
        print(table(cpu_code.rows(options.only, command)))
    else:
        print(table(rows(options.only, options.sm)))


def rows(names: Sequence[str], architectures: Sequence[int]) -> list[list[str]]:
    """The table of some of ``KINDS``, its header first."""
    header = f"sm_{', '.join(map(str, architectures))}"
    lines = [[header, "instructions per element", "once per strip", "registers", "occupancy", "spilled bytes"]]
    for name in names:
        codes = [compiled(name, architecture) for architecture in architectures]
        cells = [
            ", ".join(f"{code.per_element:.0f}" for code in codes),
            ", ".join(str(code.others) for code in codes),
            ", ".join(str(code.registers) for code in codes),
            ", ".join(f"{code.occupancy:.0%}".replace("%", " %") for code in codes),
            ", ".join(str(code.spilled) for code in codes),
        ]
        lines.append([name, *cells])
    return lines


def table(lines: Sequence[Sequence[str]]) -> str:
    """Cells in Markdown; the first line is the header."""
    header, *rest = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([header, "|:--" + "|--:" * (len(lines[0]) - 1) + "|", *rest])
