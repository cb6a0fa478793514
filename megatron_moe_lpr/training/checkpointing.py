"""The state of a run as a checkpoint holds it: saving it, and loading it at any layout."""

import contextlib
import dataclasses
import gc
import itertools
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard
from megatron_moe_lpr.checkpoint.format.chain import find_parent
from megatron_moe_lpr.checkpoint.format.directory import (
    CARD_FILE,
    SIDE_DIRECTORY,
    CheckpointDirectory,
)
from megatron_moe_lpr.checkpoint.format.reader import read_index
from megatron_moe_lpr.checkpoint.format.retention import hold_checkpoint
from megatron_moe_lpr.checkpoint.format.sharded_parts import trained_part, without_foreign_objects
from megatron_moe_lpr.checkpoint.format.writer import CONTENT_METADATA
from megatron_moe_lpr.checkpoint.loading.distributed_loading import load_distributed
from megatron_moe_lpr.checkpoint.loading.model_state import fill_model, parallel_load_strategy, sharded_model_state
from megatron_moe_lpr.checkpoint.saving.frozen_weights import FrozenWeights
from megatron_moe_lpr.checkpoint.saving.optimizer_state import install_local_shard_state
from megatron_moe_lpr.checkpoint.saving.saver import CheckpointSaver, Saved
from megatron_moe_lpr.engine.host_optimizer import without_classes
from megatron_moe_lpr.engine.step import TrainingState
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksum_file import CHECKSUM_FILE
from megatron_moe_lpr.files.json_files import is_integer
from megatron_moe_lpr.model.build import unwrap

# Optimizer state in the parameters' own shapes, so that TP, PP, EP and DP may all change between save and resume.
# `install_local_shard_state` saves them without gathering them on one rank.
STATE_METADATA = CONTENT_METADATA | {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}

LEARNING_RATES = ("max_lr", "min_lr")
"""Settings of a parameter group that a changed --lr or --min-lr makes differ from the checkpoint's."""


@dataclasses.dataclass
class RunState(TrainingState):
    """Everything of a run that a checkpoint holds."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    frozen: FrozenWeights | None = None
    """Saves frozen weights with the bits of the checkpoint they came from; None: they are saved as they are now."""

    def counters(self) -> dict[str, int]:
        """Steps, samples and tokens so far, by name."""
        return {
            "iteration": self.iteration,
            "consumed_samples": self.consumed_samples,
            "consumed_tokens": self.consumed_tokens,
        }


def start_save(
    saver: CheckpointSaver,
    state: RunState,
    source: CheckpointDirectory,
    card: CheckpointCard,
    trainable_only: bool = False,
) -> Saved | None:
    """Start to save this step. Every rank must call it.

    Args:
        source: the checkpoint the run started from; its tokenizer and model configuration are copied.
        card: the new checkpoint's card.json.
        trainable_only: leave out the weights that don't train.

    Returns:
        The checkpoint where the saver is not asynchronous and it is complete; else None.

    Raises:
        UserError: on every rank: this checkpoint or the previous one cannot be written.
    """
    began = time.monotonic()
    _finish_parameter_gather(state.chunks)

    def add_side_files(directory: Path) -> None:
        ignored = shutil.ignore_patterns(CHECKSUM_FILE.name)
        shutil.copytree(source.side_directory, directory / SIDE_DIRECTORY, dirs_exist_ok=True, ignore=ignored)
        card.write(directory / SIDE_DIRECTORY / CARD_FILE)

    content = sharded_state(state, trainable_only=trainable_only)
    return saver.start(state.iteration, content, dict(STATE_METADATA), add_side_files, began)


def expect_saves(saver: CheckpointSaver, state: RunState, trainable_only: bool = False) -> None:
    """Prepare for `start_save` when the optimizer has its state, after the first step. Every rank must call it."""
    saver.expect(sharded_state(state, trainable_only=trainable_only), dict(STATE_METADATA))


def _finish_parameter_gather(chunks: list[DistributedDataParallel]) -> None:
    """Gather the updated weights where --overlap-param-gather leaves that to the next forward pass.

    Until then a rank has only its own part of the new weights (distrib_optimizer.py `step_with_ready_grads`).
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            _gather_parameters(chunk)


def _gather_parameters(chunk: DistributedDataParallel) -> None:
    """Gather updated weights, and renew the transposed copies of weights in FP8.

    Megatron-Core renews the copies when it finishes the gathering of the forward pass (param_and_grad_buffer.py
    `finish_param_sync`). It would skip that after this gathering, and the next backward pass would use old copies.
    """
    chunk.start_param_sync(force_sync=True)
    in_fp8 = [parameter for parameter in chunk.parameters() if is_float8tensor(parameter)]
    if in_fp8:
        post_all_gather_processing(in_fp8)


def load_run(state: RunState, directory: CheckpointDirectory, start: CheckpointDirectory) -> None:
    """Fill model, optimizer, schedule and counters from a checkpoint of this run, written at any layout.

    Optimizer and schedule keep the settings that this state was built with: where these differ from the checkpoint's,
    `resuming.find_resume_point` has checked that the difference was accepted.

    Args:
        start: the checkpoint with which the model was filled; it must hold what `directory` does not.

    Raises:
        UserError: `start` is not the base of `directory`.
    """
    settings = _optimizer_settings(state.optimizer)
    before = [dict(group) for group in state.optimizer.param_groups]
    trainable_only = directory.card().parent is not None
    if trainable_only:
        find_parent(dataclasses.replace(directory, parent_path=start.path))
    content = sharded_state(state, is_loading=True, trainable_only=trainable_only)
    keys = read_index(directory.path / ".metadata").state_dict_metadata
    content |= {name: without_foreign_objects(content[name], keys) for name in _model_names(content)}
    with hold_checkpoint(directory.path):
        loaded = load_distributed(content, directory.path, parallel_load_strategy())
    for name, chunk in zip(_model_names(loaded), state.chunks, strict=True):
        fill_model(chunk, loaded[name], is_complete=not trainable_only)
    # Megatron-Core 0.19 matches groups by their learning rates too, which may have changed; they are restored below.
    for group in (*state.optimizer.param_groups, *itertools.chain(*_param_groups(loaded["optimizer"]))):
        group.update({name: None for name in LEARNING_RATES if name in group})
    _number_equal_groups(state.optimizer, loaded["optimizer"])
    state.optimizer.load_state_dict(loaded["optimizer"])
    for group, kept, own in zip(state.optimizer.param_groups, settings, before, strict=True):
        # What only this optimizer has: torch's or Transformer Engine's saved the state of the other.
        group.update({name: value for name, value in own.items() if name not in group} | kept)
    if unwrap(state.chunks[0]).config.fp8_new_expert_parameters:
        _round_weights_again(state)
    elif state.optimizer.config.use_precision_aware_optimizer:
        # Each rank has set its part of the weights from the fp32 ones.
        for chunk in state.chunks:
            _gather_parameters(chunk)
    state.schedule.load_state_dict(loaded["schedule"])
    _set_counters(state, loaded["counters"], directory)


def _set_counters(state: RunState, counters: Any, directory: CheckpointDirectory) -> None:
    # Only known names: a file from an unknown source could replace any attribute of the run.
    for name in state.counters():
        value = counters.get(name) if isinstance(counters, dict) else None
        if not is_integer(value) or value < 0:
            raise UserError(f"{directory.path}: common.pt: the counter {name} is no number; use another checkpoint")
        setattr(state, name, value)


def _optimizer_settings(optimizer: MegatronOptimizer) -> list[dict[str, Any]]:
    """Settings of each parameter group that loading a checkpoint would overwrite."""
    names = (*LEARNING_RATES, "betas", "eps", "wd_mult")
    return [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]


def _number_equal_groups(optimizer: MegatronOptimizer, loaded: Any) -> None:
    """Number parameter groups of equal settings, as routers and other dense weights are in groups of their own.

    Megatron's fp32 optimizer matches groups by these settings alone (optimizer.py `_filter_and_reorder_param_groups`)
    and would give several groups the parameters of one. The number is put into `wd_mult`, which is restored later.
    """
    present = [part.param_groups for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    stored = list(_param_groups(loaded))
    if sum(map(len, present)) != sum(map(len, stored)):
        return
    for groups in (*present, *stored):
        seen: Counter[tuple] = Counter()
        for group in groups:
            settings = tuple(group.get(name) for name in param_group_identifier_keys)
            group["wd_mult"] = (group["wd_mult"], seen[settings])
            seen[settings] += 1


def _param_groups(loaded: Any) -> Iterator[list[dict[str, Any]]]:
    """Yield the lists of parameter groups in a loaded state of Megatron's chained optimizers, at any level."""
    children = loaded if isinstance(loaded, list) else []
    if isinstance(loaded, dict):
        yield loaded.get("param_groups", [])
        children = [value for name, value in loaded.items() if name != "param_groups"]
    for child in children:
        yield from _param_groups(child)


def _round_weights_again(state: RunState) -> None:
    """Set weights in FP8 from the optimizer's fp32 copies, as after each step.

    The checkpoint holds FP8 weights dequantised to bf16; quantised again, they would get other scales.
    """
    for optimizer in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        optimizer._copy_main_params_to_model_params()
    for chunk in state.chunks:
        _gather_parameters(chunk)


def _model_names(state: dict[str, Any]) -> list[str]:
    return sorted(name for name in state if name.startswith("model"))


def sharded_state(state: RunState, is_loading: bool = False, trainable_only: bool = False) -> dict[str, Any]:
    """Return the contents of a checkpoint of this run as a sharded state dict of Megatron's dist_checkpointing."""
    model = sharded_model_state(state.chunks)
    install_local_shard_state(state.optimizer)
    with _without_garbage_collection():
        optimizer = state.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(STATE_METADATA))
    without_classes(itertools.chain(*_param_groups(optimizer)))
    if trainable_only:
        model = {name: trained_part(part) for name, part in model.items()}
    elif state.frozen and not is_loading:
        # Only now: the optimizer's part above is built from the parameters' own entries.
        model = {name: state.frozen.announce(part) for name, part in model.items()}
    return {
        **model,
        "optimizer": optimizer,
        "schedule": state.schedule.state_dict(),
        "counters": state.counters(),
    }


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Make garbage collections inside the block take no time, by freezing all objects (`gc.freeze`).

    Megatron's distributed optimizers each call gc.collect (distrib_optimizer.py `sharded_state_dict`): half a second
    over the objects of torch alone, longer than the rest of an asynchronous save. Where the process has frozen objects
    before, they stay frozen and the collection is quick anyway.
    """
    already = gc.get_freeze_count() > 0
    if not already:
        gc.freeze()
    try:
        yield
    finally:
        if not already:
            gc.unfreeze()
