"""Build the model chunks of this rank."""

import logging
import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import Float16Module

from megatron_moe_lpr.model.configuration.config import ModelShape, MoELPRConfig
from megatron_moe_lpr.model.gpt import MoELPRModel
from megatron_moe_lpr.model.moe.expert_states import ExpertStates
from megatron_moe_lpr.model.spec import block_spec
from megatron_moe_lpr.model.vocabulary import VocabularyLayout
from megatron_moe_lpr.platform import Platform

VOCABULARY_DIVISOR = 128
NEW_ROWS_DIVISOR = 8
"""Rows that a matrix product of bf16 on a GPU computes without a remainder."""


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding matrix: the next multiple of 128 x TP, as Megatron pads it."""
    multiple = VOCABULARY_DIVISOR * tensor_parallel_size
    return math.ceil(vocab_size / multiple) * multiple


def padded_new_tokens(new_tokens: int, tensor_parallel_size: int) -> int:
    """Rows of a vocabulary extension's matrix: the next multiple of 8 x TP."""
    multiple = NEW_ROWS_DIVISOR * tensor_parallel_size
    return math.ceil(new_tokens / multiple) * multiple


def vocabulary_layout(shape: ModelShape, tensor_parallel_size: int) -> VocabularyLayout:
    """The rows that TP ranks hold of the base model's vocabulary and of each extension."""
    base = shape.architecture.vocab_size
    extensions = {number: rows for number, rows in enumerate(shape.new_tokens) if rows}
    padded = [padded_new_tokens(rows, tensor_parallel_size) for rows in extensions.values()]
    return VocabularyLayout(
        rows=(base, *extensions.values()),
        padded=(padded_vocab_size(base, tensor_parallel_size), *padded),
        ranks=tensor_parallel_size,
        extensions=tuple(extensions),
    )


def build_model(shape: ModelShape, config: MoELPRConfig, platform: Platform, **kwargs: Any) -> list[torch.nn.Module]:
    """Build this rank's model chunks, unfilled: one, or several for an interleaved pipeline.

    Args:
        kwargs: further arguments of GPTModel, for example parallel_output.

    Returns:
        The chunks, on the platform's device, in the configuration's dtype (routers in fp32).
    """
    # TransformerLayer warns of each mlp module that is not one of its own.
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    virtual_size = config.virtual_pipeline_model_parallel_size
    vp_stages = [None] if virtual_size is None else list(range(virtual_size))
    return [_build_chunk(shape, config, platform, vp_stage, kwargs) for vp_stage in vp_stages]


def _build_chunk(
    shape: ModelShape, config: MoELPRConfig, platform: Platform, vp_stage: int | None, kwargs: dict[str, Any]
) -> torch.nn.Module:
    interleaved = vp_stage is not None
    chunk = MoELPRModel(
        config,
        shape.architecture,
        block_spec(config, shape, platform.transformer_engine, vp_stage),
        vocabulary_layout(shape, config.tensor_model_parallel_size),
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=not interleaved, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=not interleaved, vp_stage=vp_stage),
        vp_stage=vp_stage,
        **kwargs,
    ).to(platform.device)
    _mark_split_weights(chunk)
    return Float16Module(config, chunk) if config.bf16 else chunk


def _mark_split_weights(chunk: torch.nn.Module) -> None:
    """Mark weights that TP ranks hold different parts of. Megatron's local layers do so when they initialise a weight
    (tensor_parallel/layers.py), and here they initialise none; of an unmarked weight the gradient norm would count
    one TP rank's part only. Transformer Engine's grouped layers mark them up to 2.11; newer ones leave out weights that
    are not one tensor (module/grouped_linear.py `set_tensor_parallel_attributes`)."""
    for module in chunk.modules():
        dimension = _split_dimension(module)
        weights = [getattr(module, "weight", None)]
        if isinstance(module, ExpertStates):
            dimension = 1 if module.parallel_mode == "row" else 0
            weights = [getattr(module, f"weight{index}") for index in range(module.num_gemms)]
        for weight in weights:
            if dimension is not None and weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dimension, stride=1)


def _split_dimension(module: torch.nn.Module) -> int | None:
    """The dimension of a local layer's weight that TP splits; None: another module."""
    if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
        return 0
    return 1 if isinstance(module, RowParallelLinear) else None


def unwrap(module: torch.nn.Module) -> MoELPRModel:
    """The model inside Float16Module and DistributedDataParallel."""
    while not isinstance(module, MoELPRModel):
        module = module.get_submodule("module")
    return module
