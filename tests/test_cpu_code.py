"""The machine code of the C kernel: how many instructions its loops take, and how these are counted."""

from __future__ import annotations

import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from subprocess import run
from typing import Any

import pytest

from launch import bench
from launch.benchmarks import code, cpu_code
from launch.benchmarks.cpu_code import KINDS, SOURCE, WIDTHS, command, compiled, function, version
from launch.benchmarks.machine_code import Function, Instruction, Weight
from launch.job.world import UserError
from sm3_dist.compiled.sources import FOLDER
from sm3_dist.kernels.c import backend as cpu

needs_gcc = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not (shutil.which("gcc") and shutil.which("objdump")),
    reason="the loops are for x86-64, and gcc compiles and objdump prints them",
)

TWO_LOOPS = """
0000000000000000 <counted>:
   0:\tbnd jmp 40 <counted+0x40>
  10:\tvmovaps 0x8(%rsp),%ymm0        # a first part that is not there the first time around
  14:\tvmovups %ymm0,(%rdi,%rax,4)
  18:\tvsqrtps 0x40(%rsi),%ymm1
  1c:\tmov    0x3(%rip),%rdx        # 20 <counted+0x20>
  20:\tje     30 <counted+0x30>
  24:\tvmovups %zmm2,(%rcx){%k1}
  30:\taddl   $0x1,0x10(%rsp)
  34:\tcmpl   $0x40,(%rsp)
  38:\tjl     10 <counted+0x10>
  3c:\tlea    (%rdi,%rax,4),%rdi
  40:\ttest   %rdi,%rdi
  44:\tjne    18 <counted+0x18>
  48:\tret
"""


EVERY_CODE = """
int main(void) {{
    int8_t codes[2 * LANES], again[2 * LANES];
    for (int first = -128; first < 128; first += 2 * LANES) {{
        for (int i = 0; i < 2 * LANES; i++) codes[i] = (int8_t)(first + i);
        floats_{width} some, more;
        load_more_codes_{width}(codes, &some, &more);
        store_codes_{width}(again, some, every_int_{width}(0), lanes_of_{width}(LANES), 1);
        store_codes_{width}(again + LANES, more, every_int_{width}(0), lanes_of_{width}(LANES), 1);
        if (memcmp(codes, again, sizeof codes)) return 1;
    }}
    return 0;
}}
"""
"""Reads and writes every code of momentum with vectors of one width."""


def gcc_release() -> int:
    return int(run(["gcc", "-dumpversion"], check=True, capture_output=True).stdout.split(b".")[0])


def instruction(text: str) -> Instruction:
    return Function(f"   0:\t{text}\n").instructions[0]


@needs_gcc
def test_a_compiler_that_does_not_know_of_a_processor_is_not_asked_about_it() -> None:
    """GCC 9, of Ubuntu 20.04, has neither the instruction nor the name of AVX512_BF16, and 8, of RHEL 8, neither."""
    named = ('__builtin_cpu_supports("avx512bf16")', '"vcvtneps2bf16 ', '"avx512_bf16"')
    for options, is_named in (([], True), (["-U__GNUC__", "-D__GNUC__=9"], False)):
        found = run(["gcc", "-E", "-DSM3_SOURCES=0", *options, str(FOLDER / "cpu.c")], check=True, capture_output=True)
        assert [text in found.stdout.decode() for text in named] == [is_named] * 3


@needs_gcc
def test_the_loops_of_the_kernel_take_few_instructions(
    sampled: Callable[[Any], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer than before something was added to them; those that are no moves differ least between compilers."""
    monkeypatch.setenv("CC", "gcc")
    words = command()
    room = 1.05 if gcc_release() >= 16 else 1.0  # one instruction in 16 elements more, without the recipe
    for name, width in sampled([(name, width) for name in KINDS for width in WIDTHS]):
        found = compiled(name, width, words).per_element
        most = [room * limit for limit in KINDS[name].most[list(WIDTHS).index(width)]]
        assert 0 < found["instructions"] <= most[0], (name, width, version(words))
        assert 0 < found["of these no moves"] <= most[1], (name, width, version(words))


@needs_gcc
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("name", "instruction", "lines", "places"),
    [
        ("recipe, float32, float32 momentum", "prefetcht1", 3 * 4, {"avx2": 2, "avx512": 3}),
        ("recipe, bfloat16, bfloat16 momentum", "prefetcht0", 3 * 2, {"avx2": 1, "avx512": 1}),
    ],
)
def test_memory_is_asked_for_ahead(
    name: str, instruction: str, lines: int, places: dict[str, int], width: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All cache lines of a group: of float32 in wide rows, where rows take turns, or in short tensors of the next, and
    not into the cache that wide rows overflow. (GCC 16 makes several loops of one, each with all of them.)"""
    monkeypatch.setenv("CC", "gcc")
    found = Counter(each.name for each in function(name, width, command()).instructions)
    asked = {each: divmod(count, lines) for each, count in found.items() if each.startswith("prefetch")}
    assert asked.keys() == {instruction}
    times, rest = asked[instruction]
    assert rest == 0
    assert times == places[width] or (gcc_release() >= 16 and times > places[width])


@needs_gcc
@pytest.mark.parametrize("width", WIDTHS)
def test_vectors_of_codes_are_made_without_what_c_leaves_undefined(width: str, tmp_path: Path) -> None:
    """Numbers that overflow or negative ones that are shifted, of which compilers may make what they like, end it."""
    if width not in cpu.widths():
        pytest.skip(f"this processor has no {width}")
    source, program = tmp_path / "codes.c", tmp_path / "codes"
    function = EVERY_CODE.format(width=width)
    source.write_text(SOURCE.format(target=WIDTHS[width], function=function))
    checked = ["-O1", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    words = ["gcc", "-std=gnu11", *checked, f"-I{FOLDER}", str(source), "-o", str(program), "-lm"]
    run(words, check=True, capture_output=True)
    assert run([str(program)]).returncode == 0


@needs_gcc
def test_the_table_has_a_row_for_each_kind(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert KINDS.keys() == code.KINDS.keys()
    monkeypatch.setenv("CC", "gcc")
    bench.main(["code", "--device", "cpu", "--only", "float32"])
    compiler, _, *lines = capsys.readouterr().out.splitlines()
    assert "gcc" in compiler
    header, _, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert header == ["avx2, avx512", "instructions per element", "on vectors", "of these no moves", "loads", "stores"]
    assert row[0] == "float32"
    assert row[-1] == "0.25, 0.12"  # weights and maxima, 8 or 16 at a time


@pytest.mark.parametrize("missing", ["gcc", "objdump"])
def test_what_is_missing_is_one_line(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu_code, "_said", lambda *words: '["gcc"]')
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == missing else tool)
    with pytest.raises(SystemExit) as left:
        bench.main(["code", "--device", "cpu"])
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        f"error: counting instructions needs a C compiler and objdump, and there is no {missing}\n"
    )


def test_another_processor_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(UserError, match="for x86-64, and this is aarch64"):
        command()


def test_what_fails_says_its_last_line() -> None:
    with pytest.raises(UserError, match=r"failed: ZeroDivisionError"):
        cpu_code._said(sys.executable, "-c", "1 / 0")


@pytest.mark.parametrize(
    ("text", "loads", "stores"),
    [
        ("vmulps (%rdi),%zmm0,%zmm1", True, False),
        ("vmovups %zmm0,0x40(%rdi,%rax,4){%k1}", False, True),
        ("vpmovsdb %zmm0,(%rdi)", False, True),
        ("vbroadcastss 0x0(%rip),%ymm1        # 20 <x>", True, False),
        ("mov    %eax,(%rdi)", False, True),
        ("mov    (%rdi),%eax", True, False),
        ("add    $0x1,(%rdi)", True, True),
        ("cmpq   $0x0,(%rdi)", True, False),
        ("lea    (%rdi,%rax,4),%rdx", False, False),
        ("prefetcht0 0x1000(%rdi)", False, False),
        ("nopw   0x0(%rax,%rax,1)", False, False),
        ("notrack jmp *(%rdi)", False, False),
        ("vaddps %zmm0,%zmm1,%zmm2", False, False),
        ("ret", False, False),
    ],
)
def test_what_reads_and_writes_memory(text: str, loads: bool, stores: bool) -> None:
    assert (instruction(text).loads, instruction(text).stores) == (loads, stores)


def test_the_way_around_the_innermost_loop_is_that_of_most_weight() -> None:
    """The loop begins in the middle, after a part that is left out the first time around; another is around it."""
    function = Function(TWO_LOOPS)

    def far_stores(each: Instruction) -> Weight:
        return int(each.stores and not each.is_local), 0, -1

    def brevity(each: Instruction) -> Weight:
        return 0, 0, -1

    (loop,) = function.innermost_loops()
    assert function.instructions[loop.first].name == "vsqrtps"
    whole = [each.name for each in function.way(loop, far_stores)]
    assert whole == ["vsqrtps", "mov", "je", "vmovups", "addl", "cmpl", "jl", "vmovaps", "vmovups"]
    assert len(function.way(loop, brevity)) == 8
