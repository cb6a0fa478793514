"""Loads the weights of a built model from a distributed checkpoint, at any parallel layout."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.fp8_utils import is_float8tensor

from megatron_moe_lpr.checkpoint.format.chain import checkpoint_chain
from megatron_moe_lpr.checkpoint.format.common_state import COMMON_KEY
from megatron_moe_lpr.checkpoint.format.directory import CheckpointDirectory
from megatron_moe_lpr.checkpoint.format.reader import read_index
from megatron_moe_lpr.checkpoint.format.sharded_parts import part_with_keys
from megatron_moe_lpr.checkpoint.format.writer import CONTENT_METADATA
from megatron_moe_lpr.checkpoint.loading.distributed_loading import LoadStrategy, load_distributed
from megatron_moe_lpr.checkpoint.untrusted.extra_state import checked_pickles_are_read
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.build import unwrap
from megatron_moe_lpr.model.moe.expert_states import EXTRA_STATE
from megatron_moe_lpr.parallel.every_rank import union_of_ranks


def sharded_model_state(chunks: Sequence[torch.nn.Module]) -> ShardedStateDict:
    """Sharded state of this rank's model chunks, under `model` or, for several chunks, `model0`, `model1`, ..."""
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    return {
        name: unwrap(chunk).sharded_state_dict(metadata=dict(CONTENT_METADATA))
        for name, chunk in zip(names, chunks, strict=True)
    }


def load_weights(chunks: Sequence[torch.nn.Module], directory: CheckpointDirectory) -> None:
    """Load weights from a checkpoint written at any layout, and from its parents if it holds only trained weights.

    Only Transformer Engine's `_extra_state` entries may be missing.

    Raises:
        UserError: a file is damaged, or the checkpoint lacks a tensor of the model or holds one that the model lacks.
    """
    loaded: dict[str, Any] = {}
    for checkpoint in checkpoint_chain(directory):
        part = _load_tensors(chunks, checkpoint, is_complete=not loaded)
        loaded = {name: loaded.get(name, {}) | part[name] for name in part}
    for name, chunk in zip(sorted(loaded), chunks, strict=True):
        fill_model(chunk, loaded[name])
        _keep_unrounded(chunk, loaded[name])


def _load_tensors(
    chunks: Sequence[torch.nn.Module], checkpoint: CheckpointDirectory, is_complete: bool
) -> dict[str, Any]:
    """Load one checkpoint of a chain: by chunk, its tensors by name.

    Args:
        is_complete: the checkpoint must hold every tensor of the model, as the oldest one of a chain does.
    """
    state = sharded_model_state(chunks)
    names = list(state)
    if not is_complete:
        keys = read_index(checkpoint.path / ".metadata").state_dict_metadata
        state = {name: part_with_keys(part, keys) for name, part in state.items()}
    # Before: what the model asks for, since the loader puts values in the place of some entries.
    asked = {entry.key for entry in nested_values(load_preprocess(state)[0])}
    # Megatron's word for keys that the model asks for and the checkpoint lacks is "unexpected".
    loaded, _, lacking = load_distributed(
        state, checkpoint.path, parallel_load_strategy(), strict=StrictHandling.RETURN_UNEXPECTED
    )
    stored = sorted(read_index(checkpoint.path / ".metadata").state_dict_metadata)
    _refuse_differences(checkpoint.path, lacking, set(stored) - union_of_ranks(stored, asked))
    return {name: loaded.get(name, {}) for name in names}


def parallel_load_strategy() -> FullyParallelLoadStrategyWrapper:
    """A load strategy in which each rank of a data-parallel group reads a part and sends it to the others."""
    return FullyParallelLoadStrategyWrapper(
        LoadStrategy(), parallel_state.get_data_parallel_group(with_context_parallel=True)
    )


def _keep_unrounded(chunk: torch.nn.Module, state: dict[str, Any]) -> None:
    """Keep the loaded values of weights in FP8 until the optimizer has made its fp32 copies from them.

    distrib_optimizer.py `_build_model_and_main_param_groups` calls methods of these names. Copies of the rounded
    weights would lie on FP8's grid, and small first steps away from the grid would be rounded back.
    """
    for name, parameter in unwrap(chunk).named_parameters():
        if is_float8tensor(parameter):
            if is_float8tensor(state[name]):
                raise TypeError(f"{name}: megatron-core has rounded the loaded weight to FP8")
            parameter.get_high_precision_init_val = state[name].detach().cpu().clone
            parameter.clear_high_precision_init_val = partial(vars(parameter).pop, "get_high_precision_init_val", None)


def fill_model(chunk: torch.nn.Module, state: dict[str, Any], is_complete: bool = True) -> None:
    """Copy loaded tensors into a chunk.

    Args:
        is_complete: every parameter must have a loaded tensor; otherwise those without one keep their values.

    Args:
        chunk: a part of the model, wrapped or not.
        state: as `load_distributed` has loaded and checked it; its `_extra_state` entries are unpickled.
        is_complete: whether every parameter must be in `state`.

    Raises:
        UserError: a tensor other than an `_extra_state` is missing, or one is left over.
    """
    with checked_pickles_are_read():
        result = unwrap(chunk).load_state_dict(state, strict=False)
    missing = [key for key in result.missing_keys if EXTRA_STATE not in key]
    missing = missing if is_complete else []
    if missing or result.unexpected_keys:
        raise UserError(f"model and checkpoint disagree: missing {missing}, unexpected {result.unexpected_keys}")


def _refuse_differences(directory: Path, lacking: set[str], surplus: set[str]) -> None:
    missing = sorted(key for key in lacking if EXTRA_STATE not in key)
    foreign = sorted(key for key in surplus if EXTRA_STATE not in key and not key.startswith(("optimizer", COMMON_KEY)))
    if missing:
        raise UserError(f"{directory}: lacks {len(missing)} tensors of the model, for example {missing[0]}")
    if foreign:
        raise UserError(f"{directory}: holds {len(foreign)} tensors the model has no place for, e.g. {foreign[0]}")
