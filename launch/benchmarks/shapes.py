"""Shapes of the parameters of some models, and of what is hard for an optimizer: many tensors, short rows."""

from __future__ import annotations

from collections.abc import Callable

Shape = tuple[int, ...]


def gpt2() -> list[Shape]:
    """The 124 M parameters of GPT-2."""
    d = 768
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(50257, d), (1024, d), *block * 12, (d,), (d,)]


def decoder() -> list[Shape]:
    """A decoder of 1.36 B parameters as LLaMA has it (arXiv 2302.13971): gated perceptrons, no biases."""
    d, inner, words = 2048, 5632, 32000
    block = [(d,), *[(d, d)] * 4, (d,), (inner, d), (inner, d), (d, inner)]
    return [(words, d), *block * 24, (d,), (words, d)]


def resnet50() -> list[Shape]:
    """The convolutions of ResNet-50."""
    shapes: list[Shape] = [(64, 3, 7, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            shapes += [(4 * width, inputs, 1, 1)] if block == 0 else []
            inputs = 4 * width
    return shapes


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "gpt2": gpt2,
    "decoder": decoder,
    "small": lambda: [(64, 64)] * 2000,
    "embedding": lambda: [(50257, 768)],
    "resnet50": resnet50,
    "tiny": lambda: [(40, 8), (8,), (6, 4, 3, 3)],
}
