"""Configurations as their makers published them: read, planned, and converted to what transformers' class reads.

The makers' files were not at hand. What each was compared with, in copies that public repositories keep:

- helium-1-preview-2b: a copy of the whole file. Every field is equal.
- ERNIE-4.5-0.3B: the whole file of its first form, with the same class. Every field is equal.
- granite-3.3-8b, SmolLM2-1.7B: the whole file of the instruct model, equal but for vocabulary or special tokens.
- phi-4: the whole file of its first revision, equal but for special tokens.
- aya-expanse-8b: the whole file of an earlier model of these sizes, equal but for `logit_scale` (0.0625 there).
- Seed-OSS-36B, Falcon3-7B: tests that quote sizes, biases and rotary embedding. All of these are equal.
- OLMo-2-1124-7B: only the 1B's file, which has the same fields; EuroLLM-9B: parameters and positions alone.
- c4ai-command-r7b-12-2024, salamandra-7b: nothing was found. The stated number of parameters is their only check.
"""

import pytest
from transformers import AutoConfig

from megatron_moe_lpr.conversion.hugging_face.hf_config import dense_config, moe_config
from megatron_moe_lpr.conversion.tensors.blocks import grown_config
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.architecture import read_architecture
from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.configuration.families import REFUSED

COMMON = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True}
LLAMA = COMMON | {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "mlp_bias": False,
}
COHERE = COMMON | {
    "attention_bias": False,
    "bos_token_id": 5,
    "eos_token_id": 255001,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "vocab_size": 256000,
}
PUBLISHED = {
    "phi-4": COMMON
    | {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 100257,
        "embd_pdrop": 0.0,
        "eos_token_id": 100265,
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "max_position_embeddings": 16384,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 10,
        "original_max_position_embeddings": 16384,
        "pad_token_id": 100349,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 250000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 100352,
    },
    "OLMo-2-1124-7B": COMMON
    | {
        "model_type": "olmo2",
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "eos_token_id": 100257,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pad_token_id": 100277,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": 100352,
    },
    "granite-3.3-8b-base": COMMON
    | {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "attention_bias": False,
        "attention_multiplier": 0.0078125,
        "bos_token_id": 0,
        "embedding_multiplier": 12.0,
        "eos_token_id": 0,
        "hidden_size": 4096,
        "intermediate_size": 12800,
        "logits_scaling": 16.0,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "pad_token_id": 0,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 49152,
    },
    "Seed-OSS-36B-Base": COMMON
    | {
        "model_type": "seed_oss",
        "architectures": ["SeedOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.1,
        "attention_out_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "max_position_embeddings": 524288,
        "mlp_bias": False,
        "num_attention_heads": 80,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "pad_token_id": 1,
        "residual_dropout": 0.1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"rope_type": "default"},
        "rope_theta": 10000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 155136,
    },
    "aya-expanse-8b": COHERE
    | {
        "model_type": "cohere",
        "architectures": ["CohereForCausalLM"],
        "logit_scale": 0.125,
        "rope_theta": 10000,
        "torch_dtype": "float16",
        "use_qk_norm": False,
    },
    "c4ai-command-r7b-12-2024": COHERE
    | {
        "model_type": "cohere2",
        "architectures": ["Cohere2ForCausalLM"],
        "cache_implementation": "hybrid",
        "head_dim": 128,
        "layer_switch": 4,
        "logit_scale": 0.25,
        "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj",
        "rope_scaling": None,
        "rope_theta": 50000,
        "rotary_pct": 1.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "torch_dtype": "bfloat16",
        "use_embedding_sharing": True,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_parallel_embedding": True,
    },
    "helium-1-preview-2b": COMMON
    | {
        "model_type": "helium",
        "architectures": ["HeliumForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_size": 2560,
        "intermediate_size": 7040,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "num_attention_heads": 20,
        "num_hidden_layers": 24,
        "num_key_value_heads": 20,
        "pad_token_id": 3,
        "rms_norm_eps": 1e-08,
        "rope_theta": 100000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 48000,
    },
    "ERNIE-4.5-0.3B-PT": COMMON
    | {
        "model_type": "ernie4_5",
        "architectures": ["Ernie4_5ForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 131072,
        "num_attention_heads": 16,
        "num_hidden_layers": 18,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_bias": False,
        "use_cache": False,
        "vocab_size": 103424,
    },
    "EuroLLM-9B": LLAMA
    | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 42,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128000,
    },
    "salamandra-7b": LLAMA
    | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 256000,
    },
    "Falcon3-7B-Base": LLAMA
    | {
        "activation": "swiglu",
        "eos_token_id": 11,
        "head_dim": 256,
        "hidden_size": 3072,
        "intermediate_size": 23040,
        "max_position_embeddings": 32768,
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000042,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 131072,
    },
    "SmolLM2-1.7B": LLAMA
    | {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 24,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 130000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 49152,
    },
}
PARAMETERS = {
    "phi-4": 14.66e9,
    "OLMo-2-1124-7B": 7.30e9,
    "granite-3.3-8b-base": 8.17e9,
    "Seed-OSS-36B-Base": 36.15e9,
    "aya-expanse-8b": 8.03e9,
    "c4ai-command-r7b-12-2024": 8.03e9,
    "helium-1-preview-2b": 2.17e9,
    "ERNIE-4.5-0.3B-PT": 0.361e9,
    "EuroLLM-9B": 9.15e9,
    "salamandra-7b": 7.77e9,
    "Falcon3-7B-Base": 7.46e9,
    "SmolLM2-1.7B": 1.71e9,
}
"""Sizes that their makers or the hub state."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configuration(name):
    """The size is the stated one; the stock mixture's class reads what this project means, and it comes back."""
    config = PUBLISHED[name]
    architecture = read_architecture(config, "config.json")
    layers = architecture.num_layers
    size = sum(parameter.size for parameter in ModelShape(architecture, (1,) * layers, 1).parameters)
    assert size == pytest.approx(PARAMETERS[name], rel=2e-3)
    written = moe_config(config, architecture, [6] * layers, 2)
    read = AutoConfig.for_model(**written).to_dict()
    assert (read.get("num_experts") or read.get("num_local_experts"), read["num_experts_per_tok"]) == (6, 2)
    for field in ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "max_position_embeddings"):
        assert read[field] == AutoConfig.for_model(**config).to_dict()[field], field
    assert read[architecture.family.norm_epsilon[0]] == architecture.norm_epsilon
    assert read["tie_word_embeddings"] == architecture.tied_embeddings
    assert read["rope_parameters"]["rope_theta"] == config["rope_theta"]
    back = read_architecture(dense_config(written, "config.json", architecture.family.name), "config.json")
    assert back == architecture


def test_layers_of_command_r7b():
    architecture = read_architecture(PUBLISHED["c4ai-command-r7b-12-2024"], "config.json")
    assert architecture.full_attention_layers == tuple(range(3, 32, 4))
    assert [architecture.window(layer) for layer in (2, 3)] == [4096, None]
    grown = read_architecture(grown_config(PUBLISHED["c4ai-command-r7b-12-2024"], 36, (8, 17, 26, 35)), "config.json")
    assert grown.full_attention_layers == (3, 7, 8, 12, 16, 17, 21, 25, 26, 30, 34, 35)


MINI = {
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "vocab_size": 200064,
    "max_position_embeddings": 131072,
    "rope_scaling": {"type": "longrope", "long_factor": [1.0] * 48, "short_factor": [1.0] * 48},
    "partial_rotary_factor": 0.75,
}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (PUBLISHED["phi-4"] | MINI, "longrope"),
        (PUBLISHED["phi-4"] | MINI | {"rope_scaling": None}, "partial_rotary_factor"),
        (PUBLISHED["phi-4"] | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        (PUBLISHED["aya-expanse-8b"] | {"use_qk_norm": True}, "use_qk_norm"),
        (PUBLISHED["ERNIE-4.5-0.3B-PT"] | {"use_bias": True}, "use_bias"),
        (PUBLISHED["Seed-OSS-36B-Base"] | {"attention_out_bias": True}, "attention_out_bias"),
        (PUBLISHED["c4ai-command-r7b-12-2024"] | {"sliding_window": None}, "sliding_window"),
        (PUBLISHED["c4ai-command-r7b-12-2024"] | {"layer_types": ["full_attention"]}, "layer_types names 1 layers"),
        *(({"model_type": name}, reason[:40]) for name, reason in REFUSED.items()),
    ],
)
def test_refused_with_the_reason(config, words):
    with pytest.raises(UserError) as error:
        read_architecture(config, "config.json")
    assert words in str(error.value)
