"""Reading Hugging Face configurations, as transformers 5 and 4 write them."""

import json

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.architecture import read_architecture

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 128,
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def as_written(config) -> dict:
    return json.loads(config.to_json_string())


@pytest.mark.parametrize(
    ("config", "name", "head_dim"),
    [
        (Qwen2Config(**SIZES), "qwen2", 16),
        (Qwen3Config(**SIZES, head_dim=32), "qwen3", 32),
        (LlamaConfig(**SIZES), "llama", 16),
        (MistralConfig(**SIZES, head_dim=24), "mistral", 24),
    ],
)
def test_sizes_of_each_family(config, name, head_dim):
    architecture = read_architecture(as_written(config))
    assert architecture.family.name == name
    assert architecture.head_dim == head_dim
    assert (architecture.num_layers, architecture.hidden_size, architecture.ffn_hidden_size) == (2, 64, 96)
    assert (architecture.num_attention_heads, architecture.num_query_groups) == (4, 2)
    assert architecture.norm_epsilon == config.rms_norm_eps
    assert architecture.tied_embeddings == config.tie_word_embeddings
    assert architecture.rope["rope_theta"] == config.rope_parameters["rope_theta"]


def test_rope_of_transformers_4():
    config = {"model_type": "llama", **SIZES, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    rope = read_architecture(config).rope
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("linear", 5e5, 2.0)


def test_sliding_window_is_mistrals_alone():
    assert read_architecture({"model_type": "mistral", **SIZES, "sliding_window": 32}).sliding_window == 32
    assert read_architecture({"model_type": "mistral", **SIZES, "sliding_window": None}).sliding_window is None
    assert read_architecture({"model_type": "mistral", **SIZES}).sliding_window == MistralConfig().sliding_window
    assert read_architecture({"model_type": "qwen2", **SIZES, "sliding_window": 32}).sliding_window is None


def test_window_that_no_layer_has():
    """In transformers layers from max_window_layers on have a window; Qwen's published configs have no such layers."""
    config = {"model_type": "qwen2", **SIZES, "sliding_window": 32, "use_sliding_window": True}
    for layers in (2, 28):
        assert read_architecture(config | {"max_window_layers": layers}).sliding_window is None
    types = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=32, max_window_layers=2).layer_types
    assert read_architecture(config | {"layer_types": types}).sliding_window is None


def test_layer_types_of_mistral():
    config = {"model_type": "mistral", **SIZES, "sliding_window": 32}
    assert read_architecture(config | {"layer_types": ["sliding_attention"] * 2}).sliding_window == 32
    for types in (["full_attention"] * 2, ["full_attention", "sliding_attention"]):
        with pytest.raises(UserError, match="all layers must be alike"):
            read_architecture(config | {"layer_types": types})


def test_absent_key_value_heads():
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    assert read_architecture({"model_type": "llama", **sizes}).num_query_groups == SIZES["num_attention_heads"]
    with pytest.raises(UserError, match="num_key_value_heads"):
        read_architecture({"model_type": "mistral", **sizes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; supported are Qwen2ForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "original_max_position_embeddings must be a number"),
        ({"rope_scaling": {**YARN, "mscale": 0.7}}, "'yarn' with mscale"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds full_attention and sliding_att"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"vocab_size": None, "hidden_size": None}, "hidden_size"),
    ],
)
def test_unsupported_configurations_are_named(changes, words):
    config = {"model_type": "llama", **SIZES} | changes
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(UserError, match=words):
        read_architecture(config, "some/config.json")
