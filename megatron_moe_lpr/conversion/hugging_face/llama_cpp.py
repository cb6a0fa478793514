"""The export for llama.cpp's converter, which converts the stock form wrongly or not at all.

llama.cpp's Qwen2-MoE divides by the gate of the shared expert, which is zero here, and does not renormalise the chosen
experts' weights; its converter knows no dense layers in a Qwen-MoE and no sliding window in a Mixtral. Its Mixtral has
query, key and value biases, though. So:

- Qwen2 becomes a Mixtral with these biases. transformers' Mixtral would leave them out, so the directory carries a
  model type that transformers refuses. The converter has transformers 5 read the tokenizer, which for an unknown model
  type fails on `rope_scaling` beside `rope_theta`; so the rotary embedding is there as `rope_parameters`, which the
  converter reads first, and `rope_theta`.
- Qwen3, Llama and Mistral keep their stock architecture.
- Dense layers become equal experts under a zero router (`extra_tensors.py`) in all of them.
- A sliding window limits the context: what fits into it is computed exactly.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard
from megatron_moe_lpr.conversion.hugging_face.hf_config import MOE_FIELDS
from megatron_moe_lpr.conversion.hugging_face.stock_fields import mixtral_fields
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.tensors import MOE_LAYOUTS, Layout

LLAMA_CPP_MODEL_TYPE = "mixtral_for_llama_cpp"
TRIED = ("mixtral", "qwen2_moe", "qwen3_moe")
"""Stock architectures whose form for llama.cpp is known to compute the same."""
ATTENTION_FACTOR = "attention_factor"
QWEN_FIELDS = ("qkv_bias", "layer_types", "max_window_layers", "use_sliding_window")


def llama_cpp_form(
    config: Mapping[str, Any], architecture: Architecture, layout: Layout, card: CheckpointCard
) -> tuple[dict[str, Any], Layout, tuple[str, ...]]:
    """Convert the stock configuration and layout to those for llama.cpp.

    Returns:
        Configuration, layout, and warnings about what llama.cpp computes differently.

    Raises:
        UserError: llama.cpp would compute something else without an error.
    """
    config, warnings = _without_window(_without_attention_factor(config, architecture), architecture)
    if not card.is_moe:
        return config, layout, warnings
    if architecture.family.moe_model_type not in TRIED:
        raise UserError(f"--for llama.cpp: not tried with {architecture.family.moe_architecture}; leave the flag out")
    if card.top_k == 1:
        raise UserError("--for llama.cpp: it weights a single expert by 1, not by its probability; use --top-k 2")
    if architecture.family.moe_model_type == "qwen2_moe":
        left_out = (*MOE_FIELDS, *QWEN_FIELDS, "rope_scaling")
        config = {name: value for name, value in config.items() if name not in left_out}
        config |= {
            "model_type": LLAMA_CPP_MODEL_TYPE,
            "architectures": ["MixtralForCausalLM"],
            "num_experts_per_tok": card.top_k,
            "rope_parameters": {name: value for name, value in architecture.rope.items() if name != ATTENTION_FACTOR},
            **mixtral_fields(architecture, card.num_experts, card.top_k),
        }
        return config, MOE_LAYOUTS["mixtral"], warnings
    if architecture.family.moe_model_type == "qwen3_moe":
        config["mlp_only_layers"] = []
    return config, dataclasses.replace(layout, experts_everywhere=True), warnings


def _without_window(config: Mapping[str, Any], architecture: Architecture) -> tuple[dict[str, Any], tuple[str, ...]]:
    window = architecture.sliding_window
    if not window or window >= architecture.max_position_embeddings:
        return dict(config), ()
    warning = (
        f"sliding_window {window}: llama.cpp has none for this architecture; the exported context is {window} tokens "
        f"instead of {architecture.max_position_embeddings}, and beyond them it computes something else"
    )
    return {**config, "sliding_window": None, "max_position_embeddings": window}, (warning,)


def _without_attention_factor(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Leave out yarn's attention factor, which llama.cpp computes by the usual formula."""
    factor = architecture.rope.get(ATTENTION_FACTOR)
    if factor is None:
        return dict(config)
    usual = 0.1 * math.log(float(architecture.rope["factor"])) + 1.0
    if not math.isclose(float(factor), usual, rel_tol=1e-6):
        raise UserError(f"--for llama.cpp: attention_factor {factor} of yarn; llama.cpp has 0.1 ln(factor) + 1 alone")
    return {
        name: {key: entry for key, entry in value.items() if key != ATTENTION_FACTOR}
        if name in ("rope_parameters", "rope_scaling") and value
        else value
        for name, value in config.items()
    }
