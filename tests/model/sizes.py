"""Small models for tests."""

import torch

from megatron_moe_lpr.model.configuration.architecture import read_architecture
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.config import ModelShape, transformer_config
from megatron_moe_lpr.parallel.layout import ParallelLayout

SMALL = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 128,
}


def small_shape(experts: int = 4, top_k: int = 2, **changes) -> ModelShape:
    architecture = read_architecture(SMALL | changes)
    return ModelShape(architecture, (experts,) * architecture.num_layers, top_k)


def small_config(platform, shape: ModelShape, layout: ParallelLayout | None = None, dtype=torch.float32, **overrides):
    return transformer_config(
        shape, layout or ParallelLayout(), platform, ComputeOptions().with_dtype(dtype), **overrides
    )
