"""Decoders by name, by a Hugging Face configuration or by their size: shapes alone, on the meta device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

_LLAMA = {"model_type": "llama", "vocab_size": 32000}
_GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}


def _llama(hidden: int, layers: int, intermediate: int, heads: int, key_value_heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": intermediate}
    return {**_LLAMA, **sizes, "num_attention_heads": heads, "num_key_value_heads": key_value_heads}


MODELS: dict[str, dict[str, Any]] = {
    "gpt2-124m": {**_GPT2, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-355m": {**_GPT2, "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-774m": {**_GPT2, "n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-1.5b": {**_GPT2, "n_embd": 1600, "n_layer": 48, "n_head": 25},
    "llama-2-7b": _llama(4096, 32, 11008, 32, 32),
    "llama-2-13b": _llama(5120, 40, 13824, 40, 40),
    "llama-2-70b": _llama(8192, 80, 28672, 64, 8),
    "llama-3-8b": {**_llama(4096, 32, 14336, 32, 8), "vocab_size": 128256},
    "mistral-7b": _llama(4096, 32, 14336, 32, 8),
}
"""Configurations of well-known models, with the names of Hugging Face's ``config.json``."""

# What tells the families with gated perceptrons apart: biases of query, key and value; norms of queries and keys.
GATED = {"llama": (False, False), "mistral": (False, False), "qwen2": (True, False), "qwen3": (False, True)}

_WIDTH = 128  # of a head; widths are multiples of it
_SMALLEST, _LARGEST = 2e7, 1e13


class Decoder(nn.Module):
    """The parameters of a decoder-only transformer. It cannot be called.

    Args:
        config: as Hugging Face's ``config.json`` has it, of a GPT-2 or of a decoder with gated perceptrons.

    Attributes:
        blocks: the transformer's blocks, which a wrapper takes one by one.
        tensor_parallel: the dimension in which tensor parallelism cuts each parameter, by name: attention by heads,
            perceptrons by their inner channels, embedding and head by the vocabulary.

    Raises:
        ValueError: for a family that is not known here, or for values that are missing or make no sense.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     model = Decoder(MODELS["gpt2-124m"])
        >>> sum(param.numel() for param in model.parameters())
        124439808
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        family = config.get("model_type", "llama")
        if family == "gpt2":
            self._gpt2(config)
        elif family in GATED:
            self._gated(config, *GATED[family])
        else:
            known = ", ".join(["gpt2", *GATED])
            raise ValueError(
                f"model_type is {family!r}, and its parameters are not known here, only those of {known}. Name what "
                "builds the model instead, as MODULE:CALLABLE."
            )
        cut = {"query": 0, "key": 0, "value": 0, "gate": 0, "up": 0, "qkv": 0, "out": 1, "down": 1}
        self.tensor_parallel = {"embedding.weight": 0}
        for name, param in self.named_parameters():
            layer, _, kind = name.rpartition(".")
            axis = cut.get(layer.rpartition(".")[2])
            if axis is not None and (kind == "weight" or axis == 0):  # the bias of a sum is added once
                self.tensor_parallel[name] = min(axis, param.dim() - 1)
        if self.head is not None:
            self.tensor_parallel["head.weight"] = 0

    def _gpt2(self, config: Mapping[str, Any]) -> None:
        width, layers = _whole(config, "n_embd"), _whole(config, "n_layer")
        inner = _whole(config, "n_inner", 4 * width)
        self.embedding = nn.Embedding(_whole(config, "vocab_size"), width)
        self.position = nn.Embedding(_whole(config, "n_positions", 1024), width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm_attention": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm_mlp": nn.LayerNorm(width),
                    "up": nn.Linear(width, inner),
                    "down": nn.Linear(inner, width),
                }
            )
            for _ in range(layers)
        )
        self.norm: nn.Module = nn.LayerNorm(width)
        self.head: nn.Module | None = None  # tied to the embedding

    def _gated(self, config: Mapping[str, Any], qkv_bias: bool, qk_norm: bool) -> None:
        width, layers = _whole(config, "hidden_size"), _whole(config, "num_hidden_layers")
        inner, vocabulary = _whole(config, "intermediate_size"), _whole(config, "vocab_size")
        heads = _whole(config, "num_attention_heads")
        groups = _whole(config, "num_key_value_heads", heads)
        head = _whole(config, "head_dim", max(1, width // heads))
        attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))

        def block() -> nn.ModuleDict:
            parts: dict[str, nn.Module] = {
                "norm_attention": nn.RMSNorm(width),
                "query": nn.Linear(width, heads * head, bias=qkv_bias or attention_bias),
                "key": nn.Linear(width, groups * head, bias=qkv_bias or attention_bias),
                "value": nn.Linear(width, groups * head, bias=qkv_bias or attention_bias),
                "out": nn.Linear(heads * head, width, bias=attention_bias),
                "norm_mlp": nn.RMSNorm(width),
                "gate": nn.Linear(width, inner, bias=mlp_bias),
                "up": nn.Linear(width, inner, bias=mlp_bias),
                "down": nn.Linear(inner, width, bias=mlp_bias),
            }
            if qk_norm:
                parts |= {"norm_query": nn.RMSNorm(head), "norm_key": nn.RMSNorm(head)}
            return nn.ModuleDict(parts)

        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        tied = bool(config.get("tie_word_embeddings"))
        self.head = None if tied else nn.Linear(width, vocabulary, bias=False)


def read_config(path: Path) -> dict[str, Any]:
    """Read a Hugging Face ``config.json``.

    Raises:
        ValueError: it cannot be read, or holds no object.
    """
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, such as Hugging Face's config.json, not {config!r:.40}")
    return config


def of_size(parameters: float) -> dict[str, Any]:
    """The configuration of a Llama of about so many parameters.

    Args:
        parameters: between 2e7 and 1e13.

    Raises:
        ValueError: for another number.

    Example:
        >>> config = of_size(7e9)
        >>> config["hidden_size"], config["num_hidden_layers"]
        (4096, 33)
    """
    if not _SMALLEST <= parameters <= _LARGEST:
        raise ValueError(f"{parameters:g} parameters: the number must be between {_SMALLEST:g} and {_LARGEST:g}")
    best: tuple[float, dict[str, Any]] | None = None
    for width in range(_WIDTH, 1 << 17, _WIDTH):
        inner = -(-8 * width // 3 // 256) * 256
        block, rest = 4 * width**2 + 3 * width * inner + 2 * width, (2 * 32000 + 1) * width
        layers = max(1, round((parameters - rest) / block))
        error = abs(layers * block + rest - parameters) / parameters
        uneven = abs(width / (_WIDTH * layers) - 1)  # models are 128 times as wide as they are deep
        score = uneven + 20 * error
        if best is None or score < best[0]:
            best = score, _llama(width, layers, inner, width // _WIDTH, width // _WIDTH)
    assert best is not None
    return best[1]


def _whole(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A number from the configuration."""
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"the configuration has no {name}")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, but is {value!r}")
    return value
