"""Which checkpoints --save holds, which of them is the latest, and going back to an earlier one where it is damaged."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_moe_lpr.checkpoint.format.directory import (
    LATEST_FILE,
    RELEASE,
    is_iteration_directory,
    iteration_directory_name,
    write_latest,
)
from megatron_moe_lpr.checkpoint.loading.verification import warn
from megatron_moe_lpr.errors import UserError, naming
from megatron_moe_lpr.files.filesystem import sync_directory
from megatron_moe_lpr.training.configuration.config import CheckpointOptions

ASIDE = "damaged-"
"""Prefix of a checkpoint's name when it has been set aside."""


@dataclasses.dataclass(frozen=True)
class Condemned:
    """A checkpoint whose damage is proven."""

    iteration: int
    reason: str


def latest_iteration(save: Path, fall_back_to: int | None = None) -> int | None:
    """What the latest file in a run's directory says; None in a directory without checkpoints.

    A single complete checkpoint without a latest file is what a kill at the end of the first save leaves: it is the
    latest. Changes nothing.

    Args:
        fall_back_to: the iteration down to which a person lets the run go back (`--fall-back-to`).

    Raises:
        UserError: the file is missing beside several checkpoints, cannot be right, or is of a converted model.
    """
    numbers, path = iterations_in(save), save / LATEST_FILE
    with naming(path):
        text = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else None
    complete = [number for number in numbers if is_iteration_directory(save / iteration_directory_name(number))]
    if text is None and not numbers:
        return None
    if text is None and len(numbers) == 1 and complete:
        return numbers[0]
    if text == RELEASE:
        raise UserError(
            f"--save {save}: holds a checkpoint of another run (a converted model); choose another directory"
        )
    if text is None or not (text.isascii() and text.isdigit()):
        state = "is missing" if text is None else f"holds {text[:40]!r} instead of an iteration"
        raise UserError(f"--save {save}: {LATEST_FILE} {state}, and nothing is overwritten; {_advice(save, complete)}")
    _check_latest(save, int(text), complete, fall_back_to)
    return int(text)


def _check_latest(save: Path, latest: int, complete: list[int], fall_back_to: int | None) -> None:
    """Refuse a number that a damaged file may hold: of no checkpoint, or of one that several others are newer than."""
    name = iteration_directory_name(latest)
    if not os.path.lexists(save / name):
        raise UserError(
            f"--save {save}: {LATEST_FILE} names {name}, which is not there, and nothing is overwritten; "
            f"{_advice(save, complete)}"
        )
    newer = [number for number in complete if number > latest]
    # One may be: a run that is killed between its two last steps of a save leaves it.
    if len(newer) > 1 and (fall_back_to is None or latest < fall_back_to):
        raise UserError(
            f"--save {save}: {LATEST_FILE} names {name}, but {len(newer)} newer checkpoints are there, which the run "
            f"would overwrite one by one; {_advice(save, complete)}; to go back to {name}: --fall-back-to {latest}"
        )


def _advice(save: Path, complete: list[int]) -> str:
    if not complete:
        return "none of its iteration directories is complete; move them away to start again"
    newest = complete[-1]
    return (
        f"the newest complete checkpoint is {iteration_directory_name(newest)}; to go on from it: "
        f"echo {newest} > '{save / LATEST_FILE}'"
    )


def iterations_in(save: Path) -> list[int]:
    """Numbers of the iteration directories, whatever is in them, the lowest first.

    Raises:
        OSError: the directory cannot be read.
    """
    names = (name.removeprefix("iter_") for name in os.listdir(save) if name.startswith("iter_"))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def refuse_fall_back(condemned: Sequence[Condemned], options: CheckpointOptions) -> None:
    """Check that the run may go back beyond these damaged checkpoints, the newest first. Changes nothing.

    Raises:
        UserError: --no-fall-back was given, there is no older checkpoint, or it takes a person's word: when more than
            one goes, now or counted together with those that earlier starts have set aside on the way back.
    """
    save, last = options.save, condemned[-1]
    if not options.fall_back:
        raise UserError(f"{last.reason} (--no-fall-back: the checkpoint before is not taken instead)")
    older = [number for number in iterations_in(save) if number < last.iteration]
    if not older:
        raise UserError(
            f"{last.reason}; --save {save} holds no older checkpoint to go on from, and nothing was changed; move it "
            "away to start again"
        )
    gone = [iteration_directory_name(entry.iteration) for entry in condemned]
    gone += [name for number, name in _set_aside(save) if number > older[-1]]
    if len(gone) > 1 and (options.fall_back_to is None or older[-1] < options.fall_back_to):
        raise UserError(
            f"{'; '.join(entry.reason for entry in condemned)}; {len(gone)} damaged checkpoints ({', '.join(gone)}) "
            "are more than a run sets aside by itself, and nothing was changed. Check the disk and the memory of this "
            f"host first; then, to go on from {iteration_directory_name(older[-1])} if it is intact: "
            f"--fall-back-to {older[-1]}"
        )


def go_on_from(intact: int, condemned: Sequence[Condemned], save: Path) -> None:
    """Let an intact checkpoint be the latest and set damaged ones aside, under names that nothing takes for one.

    Killed in between, the latest file names the intact one already.
    """
    if condemned or not (save / LATEST_FILE).exists():
        write_latest(save, intact)
    for entry in condemned:
        path = save / iteration_directory_name(entry.iteration)
        aside = _free_name(path)
        os.rename(path, aside)
        warn(
            f"DAMAGED CHECKPOINT: {entry.reason}. It is kept as {aside.name}; the run goes on from "
            f"{iteration_directory_name(intact)} and repeats {entry.iteration - intact:,} steps"
        )
    if condemned:
        sync_directory(save)


def _set_aside(save: Path) -> list[tuple[int, str]]:
    """Iteration and name of each checkpoint that an earlier start has set aside."""
    prefix = f"{ASIDE}iter_"
    names = [name for name in os.listdir(save) if name.startswith(prefix)]
    numbers = [(name.removeprefix(prefix).partition("-")[0], name) for name in names]
    return [(int(number), name) for number, name in numbers if number.isascii() and number.isdigit()]


def _free_name(path: Path) -> Path:
    candidate, count = path.with_name(f"{ASIDE}{path.name}"), 1
    while os.path.lexists(candidate):
        count += 1
        candidate = path.with_name(f"{ASIDE}{path.name}-{count}")
    return candidate
