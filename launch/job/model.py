"""The model: GPT-2's decoder-only transformer, reading bytes.

Shapes are written beside each line: B sequences, T bytes each, C channels, H heads, V vocabulary entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class Shape:
    """Size of a model.

    Args:
        layers: number of transformer blocks.
        channels: width of the residual stream.
        heads: attention heads; they divide the channels evenly.
        vocabulary: rows of the embedding; bytes need 256.

    Example:
        >>> Shape(layers=2, channels=64, heads=2).count(seq_len=32)
        118528
    """

    layers: int
    channels: int
    heads: int
    vocabulary: int = 256

    def count(self, seq_len: int) -> int:
        """Number of parameters of a model that reads up to ``seq_len`` bytes, without building it."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in GPT(self, seq_len).parameters())


# The sizes that `--model` offers. `gpt2` has GPT-2's own shapes, its 50,257 embedding rows included, so that time and
# memory are those of the real thing; reading bytes, it uses 256 of them. Those named by their size have GPT-3's widths
# and read bytes; in the place of its vocabulary they have a few blocks more.
PRESETS = {
    "tiny": Shape(layers=2, channels=32, heads=2),
    "small": Shape(layers=4, channels=128, heads=4),
    "medium": Shape(layers=6, channels=192, heads=6),
    "large": Shape(layers=8, channels=512, heads=8),
    "gpt2": Shape(layers=12, channels=768, heads=12, vocabulary=50257),
    "125m": Shape(layers=18, channels=768, heads=12),
    "350m": Shape(layers=28, channels=1024, heads=16),
    "760m": Shape(layers=27, channels=1536, heads=16),
    "1.3b": Shape(layers=26, channels=2048, heads=16),
    "2.7b": Shape(layers=34, channels=2560, heads=32),
    "6.7b": Shape(layers=33, channels=4096, heads=32),
    "13b": Shape(layers=41, channels=5120, heads=40),
    "20b": Shape(layers=44, channels=6144, heads=64),
}


class Attention(nn.Module):
    """Causal self-attention; query, key and value are layers of their own, so that tensor parallelism cuts by head."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.head_channels = channels // heads
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        # -1: under tensor parallelism a rank holds only some of the heads.
        query, key, value = (
            layer(x).unflatten(-1, (-1, self.head_channels)).transpose(1, 2)  # (B, H, T, C / H)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """The two-layer perceptron of a block, four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up = nn.Linear(channels, 4 * channels)
        self.down = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        out: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """Attention, then perceptron, each on a normalized copy of the stream and added to it."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(channels)
        self.attention = Attention(channels, heads)
        self.norm_mlp = nn.LayerNorm(channels)
        self.mlp = MLP(channels)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        attended: Tensor = x + self.attention(self.norm_attention(x))
        out: Tensor = attended + self.mlp(self.norm_mlp(attended))
        return out


class GPT(nn.Module):
    """Predict the next byte at every position.

    Args:
        shape: the size of the model.
        seq_len: the longest sequence that it reads; it has one position embedding for each place.
    """

    def __init__(self, shape: Shape, seq_len: int) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.channels)
        self.position = nn.Embedding(seq_len, shape.channels)
        self.blocks = nn.ModuleList(Block(shape.channels, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.channels)
        self.head = nn.Linear(shape.channels, shape.vocabulary, bias=False)
        self.tie()
        self.initialize()

    def tie(self) -> None:
        """Let the head share the embedding's weight (again, after a wrapper has replaced either)."""
        self.head.weight = self.embedding.weight

    def materialize(self, device: torch.device | str) -> GPT:
        """Give a model on the meta device memory and its first weights; a sharded one takes its share of them."""
        self.to_empty(device=device)
        self.tie()
        self.initialize()
        return self

    @torch.no_grad()
    def initialize(self) -> None:
        """GPT-2's start: normal weights of 0.02, less where a layer adds to the stream, and zero biases.

        Each tensor is drawn whole, and in float32, so that the start depends neither on the layout nor on the type.
        """
        depth = 2 * len(self.blocks)  # layers that add to the stream
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1)
            else:
                adds = name.endswith(("out.weight", "down.weight"))
                whole = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
                fill(parameter, whole.normal_(std=0.02 / depth**0.5 if adds else 0.02))

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> logits (B, T, V)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) + self.position(places)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def fill(parameter: Tensor, whole: Tensor) -> None:
    """Copy ``whole`` into a parameter, of a sharded one this rank's part. Every rank has the same ``whole``."""
    if isinstance(parameter, DTensor):
        part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter, whole = parameter.to_local(), part.to_local()
    parameter.copy_(whole)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of ``logits (B, T, V)`` against ``targets (B, T)``; targets of -100 do not count."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)
