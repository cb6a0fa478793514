"""Configurations of exports: fields are written where the stock class has another default."""

import dataclasses

import pytest
from transformers import AutoConfig

from megatron_moe_lpr.conversion.hugging_face.hf_config import moe_config
from megatron_moe_lpr.model.configuration.architecture import read_architecture


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_head_dimension_that_the_family_has_by_default_is_written(model_type: str) -> None:
    """As in Seed-OSS, whose stock form is Qwen2-MoE."""
    dense = {"model_type": model_type, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    dense |= {"num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 64}
    architecture = read_architecture(dense)
    family = dataclasses.replace(architecture.family, explicit_head_dim=128)
    config = moe_config(dense, dataclasses.replace(architecture, family=family, head_dim=128), [3, 3], 2)
    assert AutoConfig.for_model(**config).head_dim == 128
