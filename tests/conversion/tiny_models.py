"""Tiny random models of every family, built and saved by transformers: the independent reference of these tests."""

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()

COMMON = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
    "qwen3-tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "llama": ("llama", {"rms_norm_eps": 1e-5}),
    "llama3-tied": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {"head_dim": 24, "sliding_window": 8}),
    "mistral-full": ("mistral", {"sliding_window": None, "num_key_value_heads": 4}),
}
GRANITE = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
    "tie_word_embeddings": True,
}
FURTHER_MODELS = {
    "seed_oss": ("seed_oss", {"head_dim": 16}),
    "phi3": ("phi3", {"sliding_window": 8, "pad_token_id": None}),
    "granite": ("granite", GRANITE),
    "olmo2": ("olmo2", {}),
    "helium": ("helium", {"head_dim": 8}),
    "ernie4_5": ("ernie4_5", {"head_dim": 16}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {"logit_scale": 0.5, "sliding_window": 8, "sliding_window_pattern": 2}),
}
"""Families whose tests share few processes (`test_families.py`)."""
_EXPERTS = {"num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
MIXTURES = {
    "qwen3_moe": ("qwen3_moe", _EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe-probabilities": (
        "qwen3_moe",
        _EXPERTS
        | {"norm_topk_prob": False, "tie_word_embeddings": True, "mlp_only_layers": [1], "intermediate_size": 32},
    ),
    "qwen2_moe": ("qwen2_moe", _EXPERTS | {"norm_topk_prob": False, "shared_expert_intermediate_size": 64}),
    "qwen2_moe-renormalised": ("qwen2_moe", _EXPERTS | {"norm_topk_prob": True, "shared_expert_intermediate_size": 32}),
    "mixtral": ("mixtral", {"num_hidden_layers": 4, "num_local_experts": 8, "sliding_window": 24}),
    "olmoe": ("olmoe", {"num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 3}),
    "granitemoe": ("granitemoe", GRANITE | {"num_hidden_layers": 4, "num_local_experts": 8, "num_experts_per_tok": 3}),
}
"""Base models that are mixtures."""


def make_model(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A model with random weights, norms and biases included."""
    model_type, fields = {**MODELS, **FURTHER_MODELS, **MIXTURES}[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**COMMON, **fields}))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif parameter_name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def save_model(name: str, directory: Path, dtype: torch.dtype = torch.float32, **options: object) -> Path:
    """Save such a model, with stand-ins for tokenizer files."""
    make_model(name).to(dtype).save_pretrained(directory, **options)
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "tokenizer_config.json").write_text("{}")
    return directory


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """Load by transformers' own class; nothing may be missing, left over or of the wrong shape."""
    model, information = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, local_files_only=True, output_loading_info=True
    )
    problems = {kind: found for kind, found in information.items() if found}
    assert not problems, problems
    return model.eval()


@torch.no_grad()
def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    """Logits of two fixed sequences, [2, 64, vocabulary]."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, COMMON["vocab_size"], (2, 64), generator=generator)
    return model(tokens).logits.float()
