"""Decoders by name, by a Hugging Face configuration or by their size: shapes alone, on the meta device."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sm3_dist.planner.decoder_blocks import FAMILIES, Family, gated_block, layer_norm_block, whole

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
    "mixtral-8x7b": {**_llama(4096, 32, 14336, 32, 8), "model_type": "mixtral", "num_local_experts": 8},
    "gemma-2-2b": {
        **_llama(2304, 26, 9216, 8, 4),
        "model_type": "gemma2",
        "head_dim": 256,
        "vocab_size": 256000,
    },
    "gemma-3-1b": {
        **_llama(1152, 26, 6912, 4, 1),
        "model_type": "gemma3_text",
        "head_dim": 256,
        "vocab_size": 262144,
    },
    "phi-3-mini": {**_llama(3072, 32, 8192, 32, 32), "model_type": "phi3", "vocab_size": 32064},
    "pythia-6.9b": {**_llama(4096, 32, 16384, 32, 32), "model_type": "gpt_neox", "vocab_size": 50432},
    "deepseek-v2-lite": {
        **_llama(2048, 27, 10944, 16, 16),
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "kv_lora_rank": 512,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
    },
    "deepseek-v3": {
        **_llama(7168, 61, 18432, 128, 128),
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "first_k_dense_replace": 3,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
    },
}
"""Configurations of well-known models, with the names of Hugging Face's ``config.json``."""

LAYER_NORMS = ("gpt2", "gpt_neox")
"""The older families, by ``model_type``."""

# The dimension that tensor parallelism cuts: attention by heads, perceptrons and experts by their inner channels.
_CUT = dict.fromkeys(("query", "key", "value", "qkv", "query_up", "key_value_up"), 0)
_CUT |= {"gate": 0, "up": 0, "gate_up": 0, "shared_gate": 0, "shared_up": 0, "out": 1, "down": 1, "shared_down": 1}
_CUT_EXPERTS = {"gate_up": 1, "down": 2}

_WIDTH = 128  # of a head; widths are multiples of it
_SMALLEST, _LARGEST = 2e7, 1e13


class Decoder(nn.Module):
    """The parameters of a decoder-only transformer. It cannot be called.

    Args:
        config: as Hugging Face's ``config.json`` has it, of one of :data:`LAYER_NORMS` or
            :data:`~sm3_dist.planner.decoder_blocks.FAMILIES`. Experts are stacked in one tensor.

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
        if family in LAYER_NORMS:
            self._layer_norms(config, family)
        elif family in FAMILIES:
            self._gated(config, FAMILIES[family])
        else:
            known = ", ".join([*LAYER_NORMS, *FAMILIES])
            hint = (
                "Take what it has as text_config" if "text_config" in config else "Name what builds the model instead"
            )
            raise ValueError(
                f"model_type is {family!r}, and its parameters are not known here, only those of {known}. {hint}, as "
                "MODULE:CALLABLE."
            )
        self.tensor_parallel = {
            name: min(axis, param.dim() - 1)
            for name, param in self.named_parameters()
            if (axis := _cut(name)) is not None
        }

    def _layer_norms(self, config: Mapping[str, Any], family: str) -> None:
        if family == "gpt2":
            width, layers = whole(config, "n_embd"), whole(config, "n_layer")
            inner = whole(config, "n_inner", 4 * width)
        else:
            width, layers = whole(config, "hidden_size"), whole(config, "num_hidden_layers")
            inner = whole(config, "intermediate_size", 4 * width)
        vocabulary = whole(config, "vocab_size")
        self.embedding = _embedding(vocabulary, width)
        if family == "gpt2":
            self.position = _embedding(whole(config, "n_positions", 1024), width)
        self.blocks = _stack([layer_norm_block(width, inner)], layers)
        self.norm: nn.Module = nn.LayerNorm(width)
        tied = config.get("tie_word_embeddings", family == "gpt2")
        self.head: nn.Module | None = None if tied else nn.Linear(width, vocabulary, bias=False)

    def _gated(self, config: Mapping[str, Any], family: Family) -> None:
        width, layers = whole(config, "hidden_size"), whole(config, "num_hidden_layers")
        vocabulary = whole(config, "vocab_size")
        dense = whole(config, "first_k_dense_replace", 0, least=0) if family.experts else 0
        self.embedding = _embedding(vocabulary, width)
        self.blocks = _stack([gated_block(config, family, layer) for layer in range(min(dense + 1, layers))], layers)
        self.norm = nn.RMSNorm(width)
        tied = config.get("tie_word_embeddings", family.tied)
        self.head = None if tied else nn.Linear(width, vocabulary, bias=False)


def _embedding(count: int, width: int) -> nn.Embedding:
    """Without the random numbers, which on the meta device cost a second for nothing."""
    return nn.Embedding(count, width, _weight=torch.empty(count, width))


def _stack(blocks: list[nn.ModuleDict], layers: int) -> nn.ModuleList:
    """These blocks, and copies of the last of them."""
    return nn.ModuleList([*blocks, *(copy.deepcopy(blocks[-1]) for _ in range(layers - len(blocks)))])


def _cut(name: str) -> int | None:
    """The dimension that tensor parallelism cuts of a parameter of this name; ``None`` where there are replicas."""
    layer, _, kind = name.rpartition(".")
    layer = layer.rpartition(".")[2]
    if layer in ("embedding", "head"):  # by the vocabulary
        return 0
    if layer == "experts":
        return _CUT_EXPERTS[kind]
    axis = _CUT.get(layer)
    return axis if kind == "weight" or axis == 0 else None  # the bias of a sum is added once


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
