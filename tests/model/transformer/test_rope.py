"""Inverse frequencies against transformers' own."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_moe_lpr.model.transformer.rope import attention_factor, inverse_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1000000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        LLAMA3,
        LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 4096},
        YARN,
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "factor": 2.0, "rope_theta": 10000.0},
        YARN | {"attention_factor": 1.3, "original_max_position_embeddings": 64},
    ],
)
def test_inverse_frequencies_equal_transformers(rope):
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=131072, rope_parameters=dict(rope)
    )
    reference = LlamaRotaryEmbedding(config)
    torch.testing.assert_close(inverse_frequencies(rope, 128), reference.inv_freq, rtol=2e-7, atol=0)
    assert attention_factor(rope) == pytest.approx(reference.attention_scaling, rel=1e-12)
