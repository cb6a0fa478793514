"""How a run finds its own checkpoint in --save: the latest intact one, of the same run."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_moe_lpr.checkpoint.card import CheckpointCard
from megatron_moe_lpr.checkpoint.directory import (
    LATEST_FILE,
    RELEASE,
    CheckpointDirectory,
    is_iteration_directory,
    iteration_directory_name,
    write_latest,
)
from megatron_moe_lpr.checkpoint.verification import verify_all, verify_small_files, warn
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.filesystem import sync_directory
from megatron_moe_lpr.training.config import CheckpointOptions
from megatron_moe_lpr.training.description import SCHEDULE, accepted_names, differences, refuse_differences
from megatron_moe_lpr.training.guards import gather_objects


@dataclasses.dataclass(frozen=True)
class OwnCheckpoint:
    """A checkpoint that this run goes on from."""

    directory: CheckpointDirectory
    changes: list[dict[str, Any]]
    """What was changed on the way and at which step: `step`, and by field [before, after]."""
    lengths: list[int]
    """Steps of the run as planned at first, after it was lengthened once, and so on."""
    recorded: dict[str, Any]
    """The run's description as the checkpoint has it."""


def find_own_checkpoint(
    options: CheckpointOptions, description: Mapping[str, Any], start: CheckpointCard
) -> OwnCheckpoint | None:
    """The latest intact checkpoint in --save, None where there is none at all. Every rank must call it.

    A damaged one is set aside under another name, and the one before taken, unless --no-fall-back says otherwise.

    Args:
        description: of the run that wants to go on, see `description.describe_run`.
        start: card of the checkpoint that the run started from.

    Raises:
        UserError: on every rank: the checkpoint is of another run, or damaged; or there are checkpoints, but no file
            that says which is the latest.
    """
    accepted = accepted_names(options.accept_changes, options.override_opt_param_scheduler)
    while (iteration := _on_rank_0(lambda: _latest(options.save))) is not None:
        found = CheckpointDirectory(options.save / iteration_directory_name(iteration), iteration)
        reason = _failure(partial(_check_files, found, options.verify))
        if reason is None:
            recorded = _recorded(found.card(), start, options.save)
            if options.use_checkpoint_opt_param_scheduler:
                description = {**description, **{name: recorded[name] for name in SCHEDULE if name in recorded}}
            refuse_differences(recorded, description, accepted, f"--save {options.save}")
            reason = _failure(partial(verify_all, found.path)) if options.verify else None
            if reason is None:
                return _own(found, recorded, description)
        _on_rank_0(partial(_fall_back, iteration, options, reason))
    return None


def _check_files(found: CheckpointDirectory, verified: bool) -> None:
    if not is_iteration_directory(found.path):
        raise UserError(f"{found.path}: no complete checkpoint: .metadata or metadata.json is missing")
    if verified:
        verify_small_files(found)
    found.card()


def _recorded(card: CheckpointCard, start: CheckpointCard, save: Path) -> dict[str, Any]:
    if card.original_fingerprint != start.original_fingerprint:
        raise UserError(f"--save {save}: holds a checkpoint of another run (of another dense model than --load's)")
    if (card.experts_per_layer, card.expansions) != (start.experts_per_layer, start.expansions):
        raise UserError(f"--save {save}: holds a checkpoint of another run (with other experts than --load's)")
    if card.inserted_blocks != start.inserted_blocks:
        raise UserError(f"--save {save}: holds a checkpoint of another run (with other inserted blocks than --load's)")
    return {"dtype": card.dtype} | (card.history[-1] if card.history else {})


def _own(found: CheckpointDirectory, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> OwnCheckpoint:
    changed = {name: list(pair) for name, pair in differences(recorded, now).items()}
    changes = [*recorded.get("changes", []), *([{"step": found.iteration, **changed}] if changed else [])]
    lengths = list(recorded.get("train_lengths", [recorded["train_iters"]]))
    if lengths[-1] != now["train_iters"]:
        lengths.append(now["train_iters"])
    return OwnCheckpoint(found, changes, lengths, dict(recorded))


def _latest(save: Path) -> int | None:
    """What the latest file says; None in a directory without checkpoints."""
    numbers = _iterations(save)
    path = save / LATEST_FILE
    if not path.exists() and not numbers:
        return None
    text = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else None
    if text == RELEASE:
        raise UserError(
            f"--save {save}: holds a checkpoint of another run (a converted model); choose another directory"
        )
    if text is None or not (text.isascii() and text.isdigit()):
        state = "is missing" if text is None else f"holds {text[:40]!r} instead of an iteration"
        complete = [number for number in numbers if is_iteration_directory(save / iteration_directory_name(number))]
        advice = "none of its iteration directories is complete; move them away to start again"
        if complete:
            advice = f"the newest complete checkpoint is {iteration_directory_name(complete[-1])}; to go on from it: "
            advice += f"echo {complete[-1]} > '{path}'"
        raise UserError(f"--save {save}: {LATEST_FILE} {state}, and nothing is overwritten; {advice}")
    return int(text)


def _iterations(save: Path) -> list[int]:
    names = (path.name.removeprefix("iter_") for path in save.glob("iter_*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def _fall_back(damaged: int, options: CheckpointOptions, reason: str) -> None:
    """Set a damaged checkpoint aside and let the one before be the latest."""
    if not options.fall_back:
        raise UserError(f"{reason} (--no-fall-back: the checkpoint before is not taken instead)")
    save = options.save
    older = [
        number
        for number in _iterations(save)
        if number < damaged and is_iteration_directory(save / iteration_directory_name(number))
    ]
    if not older:
        raise UserError(f"{reason}; --save {save} holds no older checkpoint to go on from; move it away to start again")
    path = save / iteration_directory_name(damaged)
    aside = _aside(path)
    if path.exists():
        os.rename(path, aside)
        sync_directory(save)
    write_latest(save, older[-1])
    warn(
        f"DAMAGED CHECKPOINT: {reason}. It is kept as {aside.name}; the run goes on from "
        f"{iteration_directory_name(older[-1])} and repeats {damaged - older[-1]:,} steps"
    )


def _aside(path: Path) -> Path:
    """A name that is free and that nothing takes for a checkpoint."""
    candidate, count = path.with_name(f"damaged-{path.name}"), 1
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"damaged-{path.name}-{count}")
    return candidate


def _on_rank_0(action: Callable[[], Any]) -> Any:
    """The result of `action` on rank 0, on every rank; so is its UserError."""
    value = error = None
    if dist.get_rank() == 0:
        try:
            value = action()
        except (UserError, OSError) as caught:
            error = str(caught)
    value, error = gather_objects((value, error))[0]
    if error is not None:
        raise UserError(error)
    return value


def _failure(action: Callable[[], object]) -> str | None:
    """What went wrong on any rank, the same on every rank."""
    error = None
    try:
        action()
    except (UserError, OSError) as caught:
        error = str(caught)
    return next(filter(None, gather_objects(error)), None)
