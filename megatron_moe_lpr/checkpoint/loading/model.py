"""Builds this rank's part of a model and loads its weights from a checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard
from megatron_moe_lpr.checkpoint.format.chain import hold_chain
from megatron_moe_lpr.checkpoint.format.directory import CheckpointDirectory
from megatron_moe_lpr.checkpoint.loading.model_state import load_weights
from megatron_moe_lpr.checkpoint.loading.shapes import check_sizes
from megatron_moe_lpr.checkpoint.loading.verification import check_same_on_all_ranks, open_checkpoint, verify_all
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.build import build_model
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.config import ModelShape, MoELPRConfig, transformer_config
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import Platform


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """This rank's part of a model, with weights loaded from a checkpoint."""

    chunks: list[torch.nn.Module]
    config: MoELPRConfig
    shape: ModelShape
    card: CheckpointCard
    directory: CheckpointDirectory


def model_shape(directory: CheckpointDirectory) -> ModelShape:
    """Read the model's sizes and experts from the files beside its tensors.

    Raises:
        UserError: a file is missing or invalid, or the files belong to different models.
    """
    card, architecture = directory.card(), directory.architecture()
    layers = architecture.num_layers
    if any(len(counts) != layers for counts in (card.experts_per_layer, *card.expansions)):
        raise UserError(f"{directory.path}: config.json has {layers} layers, its card another number; copy both again")
    if card.base_experts != [architecture.base_experts(layer) for layer in range(layers)]:
        raise UserError(
            f"{directory.path}: its config.json and card differ in the base model's number of experts; copy both again"
        )
    return ModelShape(
        architecture,
        tuple(card.experts_per_layer),
        card.top_k,
        tuple(map(tuple, card.expansions)),
        card.openness,
        tuple(card.inserted_blocks),
        tuple(card.new_tokens),
    )


def load_model(
    path: Path | CheckpointDirectory,
    layout: ParallelLayout,
    platform: Platform,
    options: ComputeOptions | None = None,
    build_arguments: dict[str, Any] | None = None,
    verified: bool = True,
    **overrides: Any,
) -> LoadedModel:
    """Build this rank's part of the model in `layout` and load its weights. Megatron's groups must exist.

    Args:
        path: a checkpoint directory, or one iteration in it.
        options: precision and kernels; by default the card's `compute_dtype`.
        build_arguments: further arguments of GPTModel.
        verified: first compare every file with its checksum, divided among the ranks.
        overrides: further fields of MoELPRConfig.

    Raises:
        UserError: there is no checkpoint, it is damaged, the layout does not fit, or tensors are missing, superfluous
            or of other sizes.
    """
    directory = path if isinstance(path, CheckpointDirectory) else open_checkpoint(path, verified)
    shape, card = model_shape(directory), directory.card()
    options = options or ComputeOptions().with_dtype(getattr(torch, card.compute_dtype))
    check_sizes(directory, shape)
    config = transformer_config(shape, layout, platform, options, **overrides)
    chunks = build_model(shape, config, platform, **(build_arguments or {}))
    with hold_chain(directory) as chain:
        for checkpoint in chain:
            check_same_on_all_ranks(checkpoint.path)
            if verified:
                verify_all(checkpoint.path)
        load_weights(chunks, directory)
    return LoadedModel(chunks, config, shape, card, directory)
