"""The parameters of one block of a decoder, by family: attention, perceptron or experts, norms. Shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Parts = dict[str, nn.Module]


@dataclass(frozen=True)
class Family:
    """What tells apart the families with root mean square norms and gated perceptrons.

    Attributes:
        qkv_bias: whether query, key and value have biases, whatever the configuration says.
        qk_norm: whether queries and keys are normalized, head by head.
        sandwich: whether attention and perceptron have a norm after them too.
        fused: whether query, key and value are one matrix, and gate and up another.
        latent: whether keys and values (and queries) come from a latent vector (DeepSeek).
        experts: name of the number of experts in the configuration; empty for none.
        tied: whether the head is the embedding, where the configuration does not say.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    sandwich: bool = False
    fused: bool = False
    latent: bool = False
    experts: str = ""
    tied: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "gemma": Family(tied=True),
    "gemma2": Family(sandwich=True, tied=True),
    "gemma3_text": Family(sandwich=True, qk_norm=True, tied=True),
    "phi3": Family(fused=True),
    "mixtral": Family(experts="num_local_experts"),
    "deepseek_v2": Family(latent=True, experts="n_routed_experts"),
    "deepseek_v3": Family(latent=True, experts="n_routed_experts"),
}
"""By ``model_type`` in Hugging Face's ``config.json``."""


def gated_block(config: Mapping[str, Any], family: Family, layer: int) -> nn.ModuleDict:
    """Block number ``layer`` of such a decoder."""
    width = whole(config, "hidden_size")
    parts: Parts = {"norm_attention": nn.RMSNorm(width), "norm_mlp": nn.RMSNorm(width)}
    if family.sandwich:
        parts |= {"norm_attention_after": nn.RMSNorm(width), "norm_mlp_after": nn.RMSNorm(width)}
    parts |= _latent_attention(config) if family.latent else _attention(config, family)
    if family.experts and layer >= whole(config, "first_k_dense_replace", 0, least=0):
        parts |= _experts(config, family)
    else:
        parts |= _perceptron(config, family)
    return nn.ModuleDict(parts)


def _attention(config: Mapping[str, Any], family: Family) -> Parts:
    width, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    groups = whole(config, "num_key_value_heads", heads)
    head = whole(config, "head_dim", max(1, width // heads))
    bias = bool(config.get("attention_bias"))
    parts: Parts = {"out": nn.Linear(heads * head, width, bias=bias)}
    if family.fused:
        parts["qkv"] = nn.Linear(width, (heads + 2 * groups) * head, bias=bias)
    else:
        for name, count in (("query", heads), ("key", groups), ("value", groups)):
            parts[name] = nn.Linear(width, count * head, bias=family.qkv_bias or bias)
    if family.qk_norm:
        parts |= {"norm_query": nn.RMSNorm(head), "norm_key": nn.RMSNorm(head)}
    return parts


def _latent_attention(config: Mapping[str, Any]) -> Parts:
    """Of DeepSeek: queries (in the larger models), keys and values are made of low-dimensional vectors."""
    width, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    plain, turned = whole(config, "qk_nope_head_dim"), whole(config, "qk_rope_head_dim")
    value, latent = whole(config, "v_head_dim"), whole(config, "kv_lora_rank")
    bias = bool(config.get("attention_bias"))
    parts: Parts = {
        "key_value_down": nn.Linear(width, latent + turned, bias=bias),
        "norm_key_value": nn.RMSNorm(latent),
        "key_value_up": nn.Linear(latent, heads * (plain + value), bias=False),
        "out": nn.Linear(heads * value, width, bias=bias),
    }
    if config.get("q_lora_rank") is None:
        return parts | {"query": nn.Linear(width, heads * (plain + turned), bias=False)}
    rank = whole(config, "q_lora_rank")
    return parts | {
        "query_down": nn.Linear(width, rank, bias=bias),
        "norm_query": nn.RMSNorm(rank),
        "query_up": nn.Linear(rank, heads * (plain + turned), bias=False),
    }


def _perceptron(config: Mapping[str, Any], family: Family) -> Parts:
    width, inner = whole(config, "hidden_size"), whole(config, "intermediate_size")
    bias = bool(config.get("mlp_bias"))
    down = nn.Linear(inner, width, bias=bias)
    if family.fused:
        return {"gate_up": nn.Linear(width, 2 * inner, bias=bias), "down": down}
    return {"gate": nn.Linear(width, inner, bias=bias), "up": nn.Linear(width, inner, bias=bias), "down": down}


def _experts(config: Mapping[str, Any], family: Family) -> Parts:
    """A router, the experts stacked in two tensors, and those that every token goes to."""
    width, count = whole(config, "hidden_size"), whole(config, family.experts)
    inner = whole(config, "moe_intermediate_size" if family.latent else "intermediate_size")
    stacked = {"gate_up": torch.empty(count, 2 * inner, width), "down": torch.empty(count, width, inner)}
    parts: Parts = {"router": nn.Linear(width, count, bias=False), "experts": nn.ParameterDict(stacked)}
    shared = inner * whole(config, "n_shared_experts", 0, least=0)
    if shared:
        parts |= {
            "shared_gate": nn.Linear(width, shared, bias=False),
            "shared_up": nn.Linear(width, shared, bias=False),
            "shared_down": nn.Linear(shared, width, bias=False),
        }
    return parts


def layer_norm_block(width: int, inner: int) -> nn.ModuleDict:
    """A block of GPT-2 or of GPT-NeoX: layer norms, biases, one matrix for query, key and value."""
    return nn.ModuleDict(
        {
            "norm_attention": nn.LayerNorm(width),
            "qkv": nn.Linear(width, 3 * width),
            "out": nn.Linear(width, width),
            "norm_mlp": nn.LayerNorm(width),
            "up": nn.Linear(width, inner),
            "down": nn.Linear(inner, width),
        }
    )


def whole(config: Mapping[str, Any], name: str, default: int | None = None, least: int = 1) -> int:
    """A number from the configuration.

    Raises:
        ValueError: it is missing, no integer, or too small.
    """
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"the configuration has no {name}")
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"{name} must be {'a positive integer' if least else 'an integer of at least 0'}, but is {value!r}"
        )
    return value
