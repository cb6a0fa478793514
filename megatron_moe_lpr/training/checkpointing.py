"""What of a run a checkpoint holds, and how a run goes on from it."""

import contextlib
import dataclasses
import gc
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard
from megatron_moe_lpr.checkpoint.format.directory import (
    CARD_FILE,
    SIDE_DIRECTORY,
    CheckpointDirectory,
)
from megatron_moe_lpr.checkpoint.format.retention import being_read
from megatron_moe_lpr.checkpoint.format.sharded_parts import trained_part
from megatron_moe_lpr.checkpoint.format.trainable_only import base_of
from megatron_moe_lpr.checkpoint.format.writer import CONTENT_METADATA
from megatron_moe_lpr.checkpoint.loading.distributed_loading import load_distributed
from megatron_moe_lpr.checkpoint.loading.model_state import fill_model, sharded_model_state, shared_reading
from megatron_moe_lpr.checkpoint.saving.frozen_weights import FrozenWeights
from megatron_moe_lpr.checkpoint.saving.optimizer_state import keep_shares_apart
from megatron_moe_lpr.checkpoint.saving.saver import CheckpointSaver, Saved
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksums import MANIFEST
from megatron_moe_lpr.files.json_files import is_integer
from megatron_moe_lpr.model.build import unwrap

# Optimizer state in the parameters' own shapes, so that TP, PP, EP and DP may all change between save and resume.
# `keep_shares_apart` writes them without gathering.
STATE_METADATA = CONTENT_METADATA | {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


@dataclasses.dataclass
class RunState:
    """Everything of a run that a checkpoint holds."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    frozen: FrozenWeights | None = None
    """What gives frozen weights their stored bits when the state is saved; None: they are saved as they are."""

    def counters(self) -> dict[str, int]:
        """Where in the run this is."""
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
    """Begin to save this step. Every rank must call it.

    Args:
        source: the checkpoint the run started from, whose tokenizer and configuration travel along.
        card: what the new checkpoint knows about itself.
        trainable_only: leave out the weights that don't train.

    Returns:
        The checkpoint where it is complete already (a saver that is not asynchronous), else None.

    Raises:
        UserError: this checkpoint or the one before can't be written, on every rank with the reason.
    """
    began = time.monotonic()
    _finish_parameter_gather(state.chunks)

    def add_side_files(directory: Path) -> None:
        ignored = shutil.ignore_patterns(MANIFEST.name)
        shutil.copytree(source.side_directory, directory / SIDE_DIRECTORY, dirs_exist_ok=True, ignore=ignored)
        card.write(directory / SIDE_DIRECTORY / CARD_FILE)

    content = sharded_state(state, trainable_only=trainable_only)
    return saver.start(state.iteration, content, dict(STATE_METADATA), add_side_files, began)


def expect_saves(saver: CheckpointSaver, state: RunState, trainable_only: bool = False) -> None:
    """Prepare for `start_save` when the optimizer has its state, after the first step. Every rank must call it."""
    saver.expect(sharded_state(state, trainable_only=trainable_only), dict(STATE_METADATA))


def _finish_parameter_gather(chunks: list[DistributedDataParallel]) -> None:
    """With overlapped gathering a rank has only its own share of the last step's weights until the next forward pass
    (distrib_optimizer.py `step_with_ready_grads`)."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            _gather_parameters(chunk)


def _gather_parameters(chunk: DistributedDataParallel) -> None:
    """Gather now. Weights in FP8 get their transposed copies too, which Megatron-Core leaves to the gathering in
    the forward pass (param_and_grad_buffer.py `finish_param_sync`): it would find this one done, and the next backward
    pass would multiply with the copies of the step before."""
    chunk.start_param_sync(force_sync=True)
    in_fp8 = [parameter for parameter in chunk.parameters() if is_float8tensor(parameter)]
    if in_fp8:
        post_all_gather_processing(in_fp8)


def load_run(state: RunState, directory: CheckpointDirectory, start: CheckpointDirectory) -> None:
    """Fill model, optimizer, schedule and counters from a checkpoint of this run, written at any layout.

    Settings of optimizer and schedule stay those that this state was built with: where they differ from the
    checkpoint's, `resuming.find_own_checkpoint` has seen to it that this is wanted.

    Args:
        start: the checkpoint with which the model is filled; what `directory` does not hold must be that one's.

    Raises:
        UserError: `start` is not the base of `directory`.
    """
    settings = _optimizer_settings(state.optimizer)
    trainable_only = directory.card().base is not None
    if trainable_only:
        base_of(dataclasses.replace(directory, base_path=start.path))
    content = sharded_state(state, is_loading=True, trainable_only=trainable_only)
    with being_read(directory.path):
        loaded = load_distributed(content, directory.path, shared_reading())
    for name, chunk in zip(_model_names(loaded), state.chunks, strict=True):
        fill_model(chunk, loaded[name], is_complete=not trainable_only)
    state.optimizer.load_state_dict(loaded["optimizer"])
    for group, kept in zip(state.optimizer.param_groups, settings, strict=True):
        group.update(kept)
    if unwrap(state.chunks[0]).config.fp8_new_expert_parameters:
        _round_weights_again(state)
    state.schedule.load_state_dict(loaded["schedule"])
    _set_counters(state, loaded["counters"], directory)


def _set_counters(state: RunState, counters: Any, directory: CheckpointDirectory) -> None:
    # By our names: those of a file from elsewhere could replace anything of the run.
    for name in state.counters():
        value = counters.get(name) if isinstance(counters, dict) else None
        if not is_integer(value) or value < 0:
            raise UserError(f"{directory.path}: common.pt: the counter {name} is no number; use another checkpoint")
        setattr(state, name, value)


def _optimizer_settings(optimizer: MegatronOptimizer) -> list[dict[str, Any]]:
    """By parameter group: what a checkpoint holds beside the state, and would otherwise bring back."""
    names = ("max_lr", "min_lr", "betas", "eps")
    return [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]


def _round_weights_again(state: RunState) -> None:
    """Weights in FP8 from the optimizer's fp32 ones, as after each step.

    The checkpoint holds them dequantised in bf16, which rounds once more: their scales would be others.
    """
    for optimizer in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        optimizer._copy_main_params_to_model_params()
    for chunk in state.chunks:
        _gather_parameters(chunk)


def _model_names(state: dict[str, Any]) -> list[str]:
    return sorted(name for name in state if name.startswith("model"))


def sharded_state(state: RunState, is_loading: bool = False, trainable_only: bool = False) -> dict[str, Any]:
    """What a checkpoint of this run holds, as Megatron's dist_checkpointing takes it."""
    model = sharded_model_state(state.chunks)
    keep_shares_apart(state.optimizer)
    with _nothing_to_collect():
        optimizer = state.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(STATE_METADATA))
    if trainable_only:
        model = {name: trained_part(part) for name, part in model.items()}
    elif state.frozen and not is_loading:
        # After the optimizer's part, which is made of the parameters' own entries.
        model = {name: state.frozen.announce(part) for name, part in model.items()}
    return {
        **model,
        "optimizer": optimizer,
        "schedule": state.schedule.state_dict(),
        "counters": state.counters(),
    }


@contextlib.contextmanager
def _nothing_to_collect() -> Iterator[None]:
    """Megatron's distributed optimizers each collect garbage here, against leaks of runs that never do otherwise
    (distrib_optimizer.py `sharded_state_dict`): half a second over the objects of torch alone, longer than all else of
    an asynchronous save. This run leaves collecting to Python; frozen objects are not looked at. A process that has
    frozen those of its imports itself keeps them so: what is left is soon looked through."""
    already = gc.get_freeze_count() > 0
    if not already:
        gc.freeze()
    try:
        yield
    finally:
        if not already:
            gc.unfreeze()
