"""Finds the checkpoint in --save that a run resumes from: the latest intact one, if it is of the same run."""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard, refuse_newer_format
from megatron_moe_lpr.checkpoint.format.directory import (
    CARD_FILE,
    LATEST_FILE,
    CheckpointDirectory,
    is_iteration_directory,
    iteration_directory_name,
)
from megatron_moe_lpr.checkpoint.loading.damage import prove_damage
from megatron_moe_lpr.checkpoint.loading.verification import check_same_on_all_ranks, verify_all, verify_small_files
from megatron_moe_lpr.errors import DamagedFile, UserError
from megatron_moe_lpr.files.checksum_file import CHECKSUM_FILE
from megatron_moe_lpr.parallel.every_rank import on_every_rank, on_rank_0
from megatron_moe_lpr.training.configuration.config import CheckpointOptions
from megatron_moe_lpr.training.configuration.description import (
    SCHEDULE,
    accepted_names,
    differences,
    refuse_differences,
)
from megatron_moe_lpr.training.run_directory.fall_back import (
    DamagedCheckpoint,
    iterations_in,
    latest_iteration,
    refuse_fall_back,
    set_latest,
)


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """The run's own checkpoint that it resumes from."""

    directory: CheckpointDirectory
    card: CheckpointCard
    changes: list[dict[str, Any]]
    """Accepted changes of flags, each with its `step` and, by flag, [before, after]."""
    lengths: list[int]
    """Steps of the run as first planned, after it was lengthened once, and so on."""
    recorded: dict[str, Any]
    """Description of the run in the checkpoint's history, see `description.describe_run`."""


def find_resume_point(
    options: CheckpointOptions, description: Mapping[str, Any], start: CheckpointCard
) -> ResumePoint | None:
    """Find the latest intact checkpoint in --save; None where --save holds none. Every rank must call it.

    A checkpoint whose damage is proven (`damage.prove_damage`) is renamed and the previous one used, unless
    --no-fall-back forbids it; for more than one, --fall-back-to must allow it. Nothing is renamed before an intact
    checkpoint is found. Any other failure of any rank ends the run and changes nothing.

    Args:
        description: description of this start of the run, see `description.describe_run`.
        start: card of the checkpoint that the run started from.

    Raises:
        UserError: on every rank: the checkpoint is of another run, damaged, of a newer format, or cannot be read by
            some rank; or there are checkpoints, but no file that says which is the latest.
    """
    damaged: list[DamagedCheckpoint] = []
    for iteration in _candidates(options):
        found = CheckpointDirectory(options.save / iteration_directory_name(iteration), iteration)
        try:
            point = _check_candidate(found, options, description, start)
        except DamagedFile as error:
            damaged.append(DamagedCheckpoint(iteration, prove_damage(error, found.path)))
            on_rank_0(partial(refuse_fall_back, damaged, options))
            continue
        on_rank_0(partial(set_latest, iteration, damaged, options.save))
        return point
    return None


def _candidates(options: CheckpointOptions) -> Iterator[int]:
    """Yield the latest iteration, then the earlier ones, the newest first."""
    latest = on_rank_0(partial(latest_iteration, options.save, options.fall_back_to))
    if latest is not None:
        yield latest
        older = on_rank_0(lambda: [number for number in iterations_in(options.save) if number < latest])
        yield from reversed(older)


def _check_candidate(
    found: CheckpointDirectory, options: CheckpointOptions, description: Mapping[str, Any], start: CheckpointCard
) -> ResumePoint:
    """Check one checkpoint. Raises DamagedFile, on every rank, where a file differs from what was written."""
    card = on_every_rank(partial(_check_small_files, found, options.verify))
    check_same_on_all_ranks(found.path)
    recorded = _recorded(card, start, options.save)
    if options.use_checkpoint_opt_param_scheduler:
        description = {**description, **{name: recorded[name] for name in SCHEDULE if name in recorded}}
    accepted = accepted_names(options.accept_changes, options.override_opt_param_scheduler)
    refuse_differences(recorded, description, accepted, f"--save {options.save}")
    if options.verify:
        verify_all(found.path)
    return _resume_point(found, card, recorded, description)


def _check_small_files(found: CheckpointDirectory, verified: bool) -> CheckpointCard:
    refuse_newer_format(found.side_directory / CARD_FILE)
    is_listed = verified and (found.path / CHECKSUM_FILE).is_file()
    if not is_listed and not is_iteration_directory(found.path):
        raise UserError(
            f"{found.path}: .metadata or metadata.json is missing, which proves no damage, and nothing was changed; "
            f"move it away and name another checkpoint in {LATEST_FILE}"
        )
    if verified:
        verify_small_files(found, tensor_sizes=False)
    return found.card()


def _recorded(card: CheckpointCard, start: CheckpointCard, save: Path) -> dict[str, Any]:
    if card.original_fingerprint != start.original_fingerprint:
        raise UserError(f"--save {save}: holds a checkpoint of another run (of another dense model than --load's)")
    if (card.experts_per_layer, card.expansions) != (start.experts_per_layer, start.expansions):
        raise UserError(f"--save {save}: holds a checkpoint of another run (with other experts than --load's)")
    if card.inserted_blocks != start.inserted_blocks:
        raise UserError(f"--save {save}: holds a checkpoint of another run (with other inserted blocks than --load's)")
    if card.new_tokens != start.new_tokens:
        raise UserError(f"--save {save}: holds a checkpoint of another run (with other new tokens than --load's)")
    return {"dtype": card.dtype} | (card.history[-1] if card.history else {})


def _resume_point(
    found: CheckpointDirectory, card: CheckpointCard, recorded: Mapping[str, Any], now: Mapping[str, Any]
) -> ResumePoint:
    changed = {name: list(pair) for name, pair in differences(recorded, now).items()}
    changes = [*recorded.get("changes", []), *([{"step": found.iteration, **changed}] if changed else [])]
    lengths = list(recorded.get("train_lengths", [recorded["train_iters"]]))
    if lengths[-1] != now["train_iters"]:
        lengths.append(now["train_iters"])
    return ResumePoint(found, card, changes, lengths, dict(recorded))
