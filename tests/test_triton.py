"""The Triton kernel without a GPU: its results in Triton's interpreter, and its machine code from the compiler.

Whether Triton interprets is decided when it is imported, so both run in processes of their own: this file as a script,
with what to do as its argument.
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'sm3_dist[triton]'")

ROOT = Path(__file__).parent.parent
ARCHITECTURES = (80, 90, 100)
KINDS = 7
"""How many kernels are compiled for them, see ``check_compile``."""


def run(what: str, interpret: str, *arguments: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        command = [sys.executable, __file__, what, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_interpreted_kernel_gives_the_bits_of_eager() -> None:
    assert run("interpret", "1") == "compared dtypes, options, memory, boxes; the host read nothing\n"


def test_the_kernel_compiles_for_each_architecture_without_spills(sampled: Callable[[Any], list[Any]]) -> None:
    """And into exact operations: nothing fused, approximated or flushed to zero."""
    rows = sampled(itertools.product(ARCHITECTURES, range(KINDS)))
    report = run("compile", "0", *(f"{architecture}:{kind}" for architecture, kind in rows))
    print(report)
    lines = [line.split() for line in report.splitlines()[1:]]
    assert {int(line[0]) for line in lines} == set(ARCHITECTURES)
    assert len(lines) == len(rows)
    for *_, registers, _, spills, operations in lines:
        assert 0 < int(registers) <= 255
        assert spills == "0"
        assert set(operations.split(",")) == {"add.rn", "div.rn", "mul.rn", "sqrt.rn", "sub.rn"}


def check_dtypes() -> None:
    import torch
    from against_eager import DTYPES, SETTINGS, compare, gradient

    shapes = [(), (7,), (2100,), (0,), (33, 17), (3, 300), (1, 30), (30, 1), (2, 3, 5), (6, 4, 3, 3), (3, 4, 2, 2, 2)]
    generator = torch.Generator().manual_seed(0)
    float32, bfloat16, float16 = DTYPES
    cases = [(float32, SETTINGS[1]), (float32, SETTINGS[2]), (float32, SETTINGS[4])]
    cases += [(bfloat16, SETTINGS[2]), (float16, SETTINGS[4])]
    for number, (dtype, settings) in enumerate(cases):
        weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        grads = [[gradient(s, dtype, generator, special) for s in shapes] for special in (False, True)]
        grads[1][number % len(shapes)] = None
        compare(weights, grads, "triton", **settings)


def check_options() -> None:
    """Steps after the second have an average of squares to go by."""
    import torch
    from against_eager import DTYPES, RECIPE, SETTINGS, compare, gradient

    shapes = [(), (7,), (0,), (33, 17), (3, 150), (30, 1), (5, 3, 6), (6, 4, 3, 3)]
    product = RECIPE | {"cover_block": 4, "cover_product": True, "nesterov": True}
    generator = torch.Generator().manual_seed(0)
    float32, bfloat16, float16 = DTYPES
    cases = [(float32, SETTINGS[8]), (bfloat16, SETTINGS[10]), (float32, product), (bfloat16, product)]
    cases += [(float16, product), (float16, SETTINGS[12])]
    for number, (dtype, settings) in enumerate(cases):
        taken = [s for s in shapes if len(s) < 3 or "cover_block" not in settings]  # no others with block covers
        weights = [torch.randn(shape, generator=generator).to(dtype) for shape in taken]
        grads = [[gradient(s, dtype, generator, special) for s in taken] for special in (False, True, False)]
        grads[1][number % len(taken)] = None
        compare(weights, grads, "triton", **settings)


def check_memory() -> None:
    import torch
    from against_eager import RECIPE, compare_views

    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    weights = [
        randn(101)[1:],
        randn(20 * 33 + 3)[3:].view(20, 33),
        randn(20, 30).t(),
        randn(20, 30)[:, 3:20],
        randn(4, 6, 5, 4).to(memory_format=torch.channels_last),
    ]
    grads = [[torch.empty_like(w).copy_(randn(*w.shape)) for w in weights], [randn(*w.shape) for w in weights]]
    product = RECIPE | {"cover_block": 4, "cover_product": True}
    for settings in ({}, {"momentum": 0.9}, {"cover_block": 3}, product):
        taken = 4 if "cover_block" in settings else 5
        compare_views(weights[:taken], [each[:taken] for each in grads], "triton", **settings)


def check_boxes() -> None:
    from against_eager import compare_boxes

    from sm3_dist.kernels.triton.backend import TritonKernel

    for shape in [(10, 7), (30, 300), (6, 5, 4), (5, 4, 3, 2)]:
        for replicated in (False, True):
            compare_boxes(shape, replicated, TritonKernel, ranges=2)
    for shape, block, ranges in [((10, 7), 2, 3), ((30, 70), 8, 2), ((30, 70), 3, 1)]:
        for replicated in (False, True):
            compare_boxes(shape, replicated, TritonKernel, ranges, block, is_product=block % 2 == 0)


def check_that_the_host_reads_nothing() -> None:
    """In a step like the one before: it waits for no value and sends none, so that a CUDA graph can have it."""
    from contextlib import ExitStack
    from unittest.mock import MagicMock, patch

    import torch
    from against_eager import assert_same

    from sm3_dist.kernels.eager import EagerKernel
    from sm3_dist.kernels.triton import kernel as triton_kernel
    from sm3_dist.kernels.triton.backend import TritonKernel
    from sm3_dist.layout.box import Box
    from sm3_dist.layout.shard import LocalShard
    from sm3_dist.maths.rms import square_sum
    from sm3_dist.maths.update import Settings
    from sm3_dist.step.entry import HYPERPARAMETERS, Entry

    def refuse(*_, **__):
        raise AssertionError("the host reads a tensor, or makes one of its own numbers")

    options = {"momentum": 0.9, "beta": 0.95, "bias_correction": True, "update_rms": 0.2}
    group = dict.fromkeys(HYPERPARAMETERS) | options
    numbers = {"momentum": 0.9, "beta": 0.95, "eps": 1e-30, "weight_decay": 0.1, "maximize": False, "nesterov": True}
    settings = Settings(torch.tensor(0.3), **numbers, cover_product=True, unscale=torch.tensor(0.5))
    results, works = [], []
    for work in (EagerKernel, TritonKernel):
        entries = []
        for shape in [(7,), (20, 30)]:
            generator = torch.Generator().manual_seed(0)
            param = torch.nn.Parameter(torch.randn(shape, generator=generator))
            param.grad = torch.randn(shape, generator=generator)
            shard = LocalShard(shape, (Box.whole(shape),), cover_block=8)
            accumulators = [torch.zeros(s.shape) for s in shard.stored]
            squares = square_sum(shape, torch.zeros((), dtype=torch.int64))
            moment, step = torch.zeros(shape), torch.zeros(())
            entries.append(Entry(param, group, shard, accumulators, moment, step, squares, "x"))
        works.append(work(entries))
        with torch.no_grad():
            for _ in range(2):
                works[-1].update({id(group): settings})
        results.append([x for e in entries for x in (e.param.detach(), e.momentum_buffer, e.step, *e.accumulators)])
    for expected, actual in zip(*results, strict=True):
        assert_same(actual, expected, "tensor lr")

    launched = MagicMock()  # in the place of the kernel, which the interpreter runs on the host
    with torch.no_grad(), ExitStack() as stack:
        for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            stack.enter_context(patch.object(torch.Tensor, name, refuse))
        for name in ("tensor", "as_tensor", "from_numpy"):
            stack.enter_context(patch.object(torch, name, refuse))
        stack.enter_context(patch.object(triton_kernel, "step_tiles", launched))
        works[1].update({id(group): settings})
    assert launched.__getitem__.call_count == 2
    assert [float(entry.step) for entry in works[1].entries] == [3.0, 3.0]


def check_compile(rows: list[str]) -> None:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sm3_dist.kernels.triton import kernel

    pointers = {"tiles": "*i32", "boxes": "*i64", "tensors": "*i64", "addresses": "*i64", "settings": "*fp32"}
    names = ("WEIGHT", "GRAD", "MOMENT", "NDIM", "LEAD", "TALL", "WIDE")
    names += ("CORRECT", "SQUARES", "NESTEROV", "BLOCK", "PRODUCT", "ROWS", "COLUMNS")
    signature = {**pointers, "factors": "*fp32", "aside": "*i32", **dict.fromkeys(names, "constexpr")}
    plain, recipe = (False, False, False, 0, -1, 1, 1), (True, True, False)
    kinds = [
        (tl.float32, tl.float32, None, 2, 1, 8, 256, *plain),
        (tl.float32, tl.float32, tl.float32, 1, 0, 1, 2048, *plain),
        (tl.bfloat16, tl.bfloat16, tl.bfloat16, 2, 1, 8, 256, *plain),
        (tl.float16, tl.float32, tl.float32, 4, 1, 64, 32, *plain),
        (tl.float32, tl.float32, tl.float32, 2, 1, 8, 256, *recipe, 64, 0x10, 8, 64),
        (tl.bfloat16, tl.bfloat16, tl.bfloat16, 2, 1, 8, 256, True, True, True, 32, 0x10, 8, 32),
        (tl.float16, tl.float32, tl.float32, 4, 3, 64, 8, *recipe, 64, 0x3210, 1, 8),
    ]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    print("sm weight grad momentum dimensions tile block registers shared spills operations")
    assert len(kinds) == KINDS
    for row in rows:
        architecture, number = map(int, row.split(":"))
        kind = kinds[number]
        source = ASTSource(kernel.step_tiles, signature, constexprs=dict(zip(names, kind, strict=True)))
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source, target=target, options=kernel.OPTIONS)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            command = [str(tools / "cuobjdump"), "--dump-resource-usage", cubin.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"Function step_tiles:\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        assert found is not None, usage
        registers, stack, _, local = map(int, found.groups())
        shared = compiled.metadata.shared
        names_of = r"\b(?:fma|mad|div|sqrt|rsqrt|rcp|mul|add|sub)\.[\w.]*f32"
        operations = {each.removesuffix(".f32") for each in re.findall(names_of, compiled.asm["ptx"])}
        weight, grad, moment, ndim, _, tall, wide, _, _, _, block, *_ = kind
        print(
            architecture,
            weight,
            grad,
            moment,
            ndim,
            f"{tall}x{wide}",
            block,
            registers,
            shared,
            stack + local,
            end=" ",
        )
        print(",".join(sorted(operations)))


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        check_compile(sys.argv[2:])
    else:
        import against_eager

        against_eager.threads = nullcontext  # the kernel uses none
        check_dtypes()
        check_options()
        check_memory()
        check_boxes()
        check_that_the_host_reads_nothing()
        print("compared dtypes, options, memory, boxes; the host read nothing")
