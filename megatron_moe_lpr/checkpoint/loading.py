"""From a checkpoint on disk to a filled model on this rank."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from megatron_moe_lpr.checkpoint.card import CheckpointCard
from megatron_moe_lpr.checkpoint.directory import CARD_FILE, CONFIG_FILE, CheckpointDirectory
from megatron_moe_lpr.checkpoint.model_state import load_weights
from megatron_moe_lpr.checkpoint.reader import is_model_key
from megatron_moe_lpr.checkpoint.trainable_only import open_reader, reading
from megatron_moe_lpr.checkpoint.verification import open_checkpoint, verify_all
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.build import build_model
from megatron_moe_lpr.model.config import ComputeOptions, ModelShape, MoELPRConfig, transformer_config
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.parameters import model_parameters
from megatron_moe_lpr.platform import Platform


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """This rank's part of a model, filled from a checkpoint."""

    chunks: list[torch.nn.Module]
    config: MoELPRConfig
    shape: ModelShape
    card: CheckpointCard
    directory: CheckpointDirectory


def model_shape(directory: CheckpointDirectory) -> ModelShape:
    """The model's sizes and experts, from the files beside its tensors.

    Raises:
        UserError: a file is missing or invalid, or card and configuration are of two models.
    """
    card, architecture = directory.card(), directory.architecture()
    layers = architecture.num_layers
    if any(len(counts) != layers for counts in (card.experts_per_layer, *card.expansions)):
        raise UserError(
            f"{directory.side_directory}: {CARD_FILE} and {CONFIG_FILE} do not belong to one model: one has {layers} "
            f"layers, the other {len(card.experts_per_layer)}"
        )
    return ModelShape(
        architecture,
        tuple(card.experts_per_layer),
        card.top_k,
        tuple(map(tuple, card.expansions)),
        card.openness,
    )


def check_sizes(shape: ModelShape, directory: CheckpointDirectory) -> None:
    """Check that a model's tensors are there in the sizes that card and configuration say, before memory is taken for
    them. The index has been compared with the sizes of the files.

    Raises:
        UserError: the model is larger than what is stored.
    """
    source = directory.side_directory
    tensors = open_reader(directory).tensors
    stored = sum(math.prod(info.shape) for key, info in tensors.items() if is_model_key(key))
    described = sum(model_parameters(shape).values())
    # The other way round is no danger: the vocabulary may be padded, and what differs else is named by its tensor.
    if described > stored:
        raise UserError(
            f"{source}: {CARD_FILE} and {CONFIG_FILE} describe {described:,} parameters, the checkpoint's tensors have "
            f"{stored:,}; copy these two files again"
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
    """Build this rank's part of the model in `layout` and fill it. Megatron's groups must exist.

    Args:
        path: a checkpoint directory or one iteration in it.
        options: how to compute; by default in the checkpoint's own dtype.
        build_arguments: further arguments of GPTModel.
        verified: compare every file with its checksum first, each rank a share of them.
        overrides: further fields of MoELPRConfig.

    Raises:
        UserError: no checkpoint, a damaged one, an unfit layout, or tensors that are missing or too many.
    """
    directory = path if isinstance(path, CheckpointDirectory) else open_checkpoint(path, verified)
    shape, card = model_shape(directory), directory.card()
    check_sizes(shape, directory)
    options = options or ComputeOptions(dtype=getattr(torch, card.dtype))
    config = transformer_config(shape, layout, platform, options, **overrides)
    chunks = build_model(shape, config, platform, **(build_arguments or {}))
    with reading(directory) as layers:
        for layer in layers if verified else ():
            verify_all(layer.path)
        load_weights(chunks, directory)
    return LoadedModel(chunks, config, shape, card, directory)
