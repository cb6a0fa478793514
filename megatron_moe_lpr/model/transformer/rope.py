"""Rotary position embedding: the inverse frequencies of each Hugging Face `rope_type`."""

import math
from collections.abc import Mapping
from typing import Any

import torch


def inverse_frequencies(rope: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """Inverse frequencies as transformers computes them (`modeling_rope_utils`).

    Args:
        rope: `rope_type` default, linear, llama3 or yarn, `rope_theta`, and the type's own parameters.
        head_dim: dimension of an attention head.

    Returns:
        [head_dim / 2], fp32.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (float(rope["rope_theta"]) ** exponents)
    if rope["rope_type"] == "linear":
        return frequencies / float(rope["factor"])
    if rope["rope_type"] == "llama3":
        return _llama3(frequencies, rope)
    if rope["rope_type"] == "yarn":
        return _yarn(frequencies, rope, head_dim)
    return frequencies


def _llama3(frequencies: torch.Tensor, rope: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3.1: low frequencies are divided by `factor`, high ones kept, those between interpolated."""
    factor, context = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = context * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / factor)


def _yarn(frequencies: torch.Tensor, rope: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): a ramp over the dimensions from kept to divided by `factor`."""
    context, theta = float(rope["original_max_position_embeddings"]), float(rope["rope_theta"])

    def dimension(turns: float) -> float:
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(float(rope.get("beta_fast") or 32))), 0)
    high = min(math.ceil(dimension(float(rope.get("beta_slow") or 1))), head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    slowed = ramp.clamp(0.0, 1.0)
    return frequencies / float(rope["factor"]) * slowed + frequencies * (1.0 - slowed)


def attention_factor(rope: Mapping[str, Any]) -> float:
    """Factor that yarn multiplies rotated queries and rotated keys by; 1 for the other types.

    Source: YaRN, equation 22 (sqrt(1/t) = 0.1 ln(s) + 1), unless the configuration names another factor.
    """
    if rope["rope_type"] != "yarn":
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    return 0.1 * math.log(max(float(rope["factor"]), 1.0)) + 1.0
