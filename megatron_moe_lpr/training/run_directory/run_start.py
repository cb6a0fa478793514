"""Finds the checkpoint that a run started from, whatever --load names when the run is resumed.

Users of Megatron resume with `--load X --save X`, where X is the run's own directory; and the run whose checkpoint
--load names may have saved further ones since. The run's own checkpoints then say what it started from.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard
from megatron_moe_lpr.checkpoint.format.chain import find_parent
from megatron_moe_lpr.checkpoint.format.directory import CheckpointDirectory, iteration_directory_name
from megatron_moe_lpr.checkpoint.loading.verification import open_checkpoint
from megatron_moe_lpr.errors import DamagedFile, UserError
from megatron_moe_lpr.parallel.every_rank import on_every_rank
from megatron_moe_lpr.training.configuration.config import CheckpointOptions
from megatron_moe_lpr.training.run_directory.fall_back import iterations_in, latest_iteration

if TYPE_CHECKING:
    from megatron_moe_lpr.training.run_directory.resuming import ResumePoint


def readable_load(options: CheckpointOptions) -> Path:
    """Return --load; where it is --save itself, its newest checkpoint whose small files are intact.

    The newest one may be damaged, or not yet named by the latest file (`fall_back.latest_iteration`). Which checkpoint
    the run resumes from is decided later, by all ranks together (`resuming.find_resume_point`).

    Raises:
        UserError: as `latest_iteration`, or a checkpoint cannot be read for another reason than damage.
    """
    load, save = options.load, options.save
    if not save.is_dir() or load.resolve() != save.resolve():
        return load
    latest = latest_iteration(save, options.fall_back_to)
    for number in reversed([number for number in iterations_in(save) if latest is not None and number <= latest]):
        path = save / iteration_directory_name(number)
        try:
            open_checkpoint(path, options.verify, options.base_checkpoint)
        except DamagedFile:
            continue
        return path
    return load


def open_start(options: CheckpointOptions, stage: str) -> tuple[CheckpointDirectory, CheckpointCard]:
    """Open --load; where it is a checkpoint of this run itself, the checkpoint that the run started from.

    Args:
        stage: name of the run's stage.

    Returns:
        The checkpoint that holds the weights the run does not train, and the card that the run started with.

    Raises:
        UserError: there is no such checkpoint, an incomplete one, or a damaged file.
    """
    start = open_checkpoint(options.load, options.verify, options.base_checkpoint, tensor_sizes=False)
    card = start.card()
    last = card.history[-1] if card.history else {}
    if (
        not _lies_in(start, options.save)
        or last.get("stage") != stage
        or not {"iterations", "train_iters"} <= set(last)
    ):
        return start, card
    base = find_parent(start)
    return (start, card_at_start(card)) if base is None else (base, base.card())


def find_start(
    resume_from: "ResumePoint", start: CheckpointDirectory, card: CheckpointCard, save: Path
) -> tuple[CheckpointDirectory, CheckpointCard]:
    """Correct the result of `open_start` by the checkpoint that the run resumes from. Every rank must call it.

    Raises:
        UserError: on every rank: weights that `resume_from` leaves out are neither in `start` nor where they were.
    """
    card = card_at_start(resume_from.card, card)
    if resume_from.card.parent is not None:
        return on_every_rank(lambda: _base(resume_from, start)), card
    # --load may have named a checkpoint in --save that has been renamed as damaged.
    return resume_from.directory if _lies_in(start, save) else start, card


def card_at_start(card: CheckpointCard, start: CheckpointCard | None = None) -> CheckpointCard:
    """Return the card that the run which wrote `card` started with.

    Args:
        start: card of the checkpoint that --load names now; its openness is kept where the run can have started with
            it.
    """
    entry = card.history[-1]
    steps = open_experts_steps(entry.get("open_experts_iters"), entry.get("train_lengths", [entry["train_iters"]]))
    if start is not None and newest_weight_at(start.openness, entry["iterations"], steps) == card.openness:
        openness = start.openness
    elif entry["iterations"] < steps:
        progress = entry["iterations"] / steps
        openness = min(1.0, max(0.0, (card.openness - progress) / (1.0 - progress)))
    else:
        # The weight has reached 1, whatever it started at; with the flag it started below 1.
        openness = card.openness if entry.get("open_experts_iters") is None else 0.0
    return dataclasses.replace(start or card, history=card.history[:-1], openness=openness)


def open_experts_steps(open_experts_iters: int | None, lengths: list[int]) -> int:
    """Steps over which a run opens the latest expansion's experts; default: a tenth of the run as first planned."""
    return open_experts_iters or max(1, lengths[0] // 10)


def newest_weight_at(start: float, iteration: int, steps: int) -> float:
    """Weight of the latest expansion's experts in the routers during the step that ends at `iteration`."""
    return min(1.0, start + (1.0 - start) * iteration / steps)


def _base(resume_from: "ResumePoint", start: CheckpointDirectory) -> CheckpointDirectory:
    """The checkpoint with the weights that `resume_from` leaves out: `start`, else the one that its card names."""
    reasons = []
    for path in (start.path, Path(resume_from.card.parent.path if resume_from.card.parent else "")):
        try:
            base = find_parent(dataclasses.replace(resume_from.directory, parent_path=path))
        except UserError as error:
            reasons.append(str(error))
            continue
        return base or resume_from.directory
    raise UserError(
        f"--save holds only what was trained, and neither --load nor the checkpoint that the run began from has the "
        f"rest ({'; '.join(reasons)}); give --load the one it began from"
    )


def _lies_in(checkpoint: CheckpointDirectory, save: Path) -> bool:
    return checkpoint.iteration is not None and checkpoint.path.parent == save.resolve()
