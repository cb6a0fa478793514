"""How a run finds its own checkpoint in --save: the latest intact one, of the same run."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

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
from megatron_moe_lpr.files.checksums import MANIFEST
from megatron_moe_lpr.parallel.every_rank import on_every_rank
from megatron_moe_lpr.training.configuration.config import CheckpointOptions
from megatron_moe_lpr.training.configuration.description import (
    SCHEDULE,
    accepted_names,
    differences,
    refuse_differences,
)
from megatron_moe_lpr.training.run_directory.fall_back import (
    Condemned,
    go_on_from,
    iterations_in,
    latest_iteration,
    refuse_fall_back,
)


@dataclasses.dataclass(frozen=True)
class OwnCheckpoint:
    """A checkpoint that this run goes on from."""

    directory: CheckpointDirectory
    card: CheckpointCard
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

    One that is damaged beyond doubt (`damage.prove_damage`) is set aside under another name and the one before taken,
    unless --no-fall-back says otherwise; for more than one, --fall-back-to must say so. Nothing is renamed before an
    intact one is found. Any other failure of any rank ends the run and changes nothing.

    Args:
        description: of the run that wants to go on, see `description.describe_run`.
        start: card of the checkpoint that the run started from.

    Raises:
        UserError: on every rank: the checkpoint is of another run, damaged, of a newer format, or cannot be read by
            some rank; or there are checkpoints, but no file that says which is the latest.
    """
    condemned: list[Condemned] = []
    for iteration in _candidates(options):
        found = CheckpointDirectory(options.save / iteration_directory_name(iteration), iteration)
        try:
            own = _open_own(found, options, description, start)
        except DamagedFile as error:
            condemned.append(Condemned(iteration, prove_damage(error, found.path)))
            _on_rank_0(partial(refuse_fall_back, condemned, options))
            continue
        _on_rank_0(partial(go_on_from, iteration, condemned, options.save))
        return own
    return None


def _candidates(options: CheckpointOptions) -> Iterator[int]:
    """The latest iteration, then those before it, the newest first."""
    latest = _on_rank_0(partial(latest_iteration, options.save, options.fall_back_to))
    if latest is not None:
        yield latest
        older = _on_rank_0(lambda: [number for number in iterations_in(options.save) if number < latest])
        yield from reversed(older)


def _open_own(
    found: CheckpointDirectory, options: CheckpointOptions, description: Mapping[str, Any], start: CheckpointCard
) -> OwnCheckpoint:
    """Check one checkpoint. Raises DamagedFile, on every rank, where a file does not seem to be as it was written."""
    cards = on_every_rank(partial(_check_small_files, found, options.verify))
    check_same_on_all_ranks(found.path)
    card = cards[0]
    recorded = _recorded(card, start, options.save)
    if options.use_checkpoint_opt_param_scheduler:
        description = {**description, **{name: recorded[name] for name in SCHEDULE if name in recorded}}
    accepted = accepted_names(options.accept_changes, options.override_opt_param_scheduler)
    refuse_differences(recorded, description, accepted, f"--save {options.save}")
    if options.verify:
        verify_all(found.path)
    return _own(found, card, recorded, description)


def _check_small_files(found: CheckpointDirectory, verified: bool) -> CheckpointCard:
    refuse_newer_format(found.side_directory / CARD_FILE)
    is_listed = verified and (found.path / MANIFEST).is_file()
    if not is_listed and not is_iteration_directory(found.path):
        raise UserError(
            f"{found.path}: .metadata or metadata.json is missing, which proves no damage, and nothing was changed; "
            f"move it away and name another checkpoint in {LATEST_FILE}"
        )
    if verified:
        verify_small_files(found)
    return found.card()


def _recorded(card: CheckpointCard, start: CheckpointCard, save: Path) -> dict[str, Any]:
    if card.original_fingerprint != start.original_fingerprint:
        raise UserError(f"--save {save}: holds a checkpoint of another run (of another dense model than --load's)")
    if (card.experts_per_layer, card.expansions) != (start.experts_per_layer, start.expansions):
        raise UserError(f"--save {save}: holds a checkpoint of another run (with other experts than --load's)")
    if card.inserted_blocks != start.inserted_blocks:
        raise UserError(f"--save {save}: holds a checkpoint of another run (with other inserted blocks than --load's)")
    return {"dtype": card.dtype} | (card.history[-1] if card.history else {})


def _own(
    found: CheckpointDirectory, card: CheckpointCard, recorded: Mapping[str, Any], now: Mapping[str, Any]
) -> OwnCheckpoint:
    changed = {name: list(pair) for name, pair in differences(recorded, now).items()}
    changes = [*recorded.get("changes", []), *([{"step": found.iteration, **changed}] if changed else [])]
    lengths = list(recorded.get("train_lengths", [recorded["train_iters"]]))
    if lengths[-1] != now["train_iters"]:
        lengths.append(now["train_iters"])
    return OwnCheckpoint(found, card, changes, lengths, dict(recorded))


def _on_rank_0(action: Callable[[], Any]) -> Any:
    """The result of `action` on rank 0, on every rank; so is its error."""
    return on_every_rank(lambda: action() if dist.get_rank() == 0 else None)[0]
