"""The machine code of the Triton kernels, which needs no GPU, and how they are launched.

Compiled is in a process of its own, for the others interpret: this file as a script, with what to do as its arguments.
"""

import itertools
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
from triton_process import run

pytest.importorskip("triton", reason="triton is not installed: pip install 'sm3_dist[triton]'")

ARCHITECTURES = (80, 90, 100)
KINDS = 6
"""How many kernels are compiled for them, see ``launch/benchmarks/code.py``."""


def test_the_machine_code_of_the_kernel_of_matrices(sampled: Callable[[Any], list[Any]]) -> None:
    """Few instructions per element, 16 bytes at a time, no 64-bit division, nothing fused or flushed.

    But for the short path of root and reciprocal, which says so itself.
    """
    rows = sampled(itertools.product(ARCHITECTURES, range(KINDS)))
    assert run(__file__, "0", "bindings") == "bound\n"
    report = run(__file__, "0", *(f"{architecture}:{kind}" for architecture, kind in rows))
    print(report)
    lines = [line.split() for line in report.splitlines()]
    assert len(lines) == len(rows)
    exact = {"add.rn", "add.rz", "add.rp", "div.rn", "mul.rn", "sub.rn", "fma.rn", "rsqrt.approx.ftz", "rcp.approx.ftz"}
    for _, _, instructions, most, occupancy, least, spilled, wide, divides, operations in lines:
        assert 20 <= float(instructions) <= float(most)  # or what was taken for the loop is none
        assert float(occupancy) >= float(least)
        assert (
            int(spilled) <= 40
        )  # before and after the loop: with more registers there are fewer warps, which is slower
        assert (wide, divides) == ("True", "False")
        assert set(operations.split(",")) <= exact


@pytest.mark.parametrize(("block", "vector"), [(64, 4), (200, 4), (201, 1), (130, 1), (None, 4)])
def test_strips_begin_where_vectors_do(block: int | None, vector: int) -> None:
    """Or a GPU would refuse to read them, which the interpreter does not."""
    import torch

    from sm3_dist.kernels.triton.strips import strips_of
    from sm3_dist.layout.box import Box
    from sm3_dist.layout.shard import LocalShard

    weight = torch.zeros(5, 404)
    shard = LocalShard(weight.shape, (Box.whole(weight.shape),), cover_block=block)
    (strips,) = strips_of(shard, [[weight]] * 3, 4)
    assert strips.vector == vector
    assert not (strips.fields[:, 3:5] % vector).any()  # first column, end


def check_bindings() -> None:
    """Triton's launcher gets every argument of every kernel: it is made of source text with names of its own in it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from sm3_dist.kernels.triton import ends, matrix, tiles

    backend = make_backend(GPUTarget("cuda", 90, 32))
    for kernel in (matrix.step_strip, tiles.step_tiles, ends.begin_step, ends.end_step):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        given = {name: number for number, name in enumerate(kernel.arg_names)}
        bound, _, options = bind(*given.values(), num_warps=1)
        assert bound == given, kernel
        assert options == {"num_warps": 1}


def check_compile(rows: list[str]) -> None:
    """One line for each kernel: what the test above asserts of it."""
    from launch.benchmarks.code import KINDS, compiled

    names = list(KINDS)
    for row in rows:
        architecture, number = map(int, row.split(":"))
        name = names[number]
        code = compiled(name, architecture)
        wide = all(code.operations[each] for each in ("LDG.E.128", "STG.E.128"))
        narrow = [each for each in code.operations if re.match(r"(LDG|STG)\.E\.(U8|U16|S8|S16)", each)]
        print(
            *(architecture, number, f"{code.per_element:.1f}", KINDS[name][3]),
            *(f"{code.occupancy:.3f}", KINDS[name][4], code.spilled),
            *(wide and not narrow, any("div_s64" in each or "div_u64" in each for each in code.calls)),
            ",".join(sorted(code.arithmetic)),
        )


if __name__ == "__main__":
    if sys.argv[1] == "bindings":
        check_bindings()
        print("bound")
    else:
        check_compile(sys.argv[1:])
