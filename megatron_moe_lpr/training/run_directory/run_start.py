"""The checkpoint that a run began from, whatever --load names when it is resumed.

Megatron's users resume with `--load X --save X`, where X is the run's own directory; and the run behind --load may have
gone on since. What the run began from is then said by its own checkpoints.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard
from megatron_moe_lpr.checkpoint.format.directory import CheckpointDirectory, iteration_directory_name
from megatron_moe_lpr.checkpoint.format.trainable_only import base_of
from megatron_moe_lpr.checkpoint.loading.verification import open_checkpoint
from megatron_moe_lpr.errors import DamagedFile, UserError
from megatron_moe_lpr.parallel.every_rank import on_every_rank
from megatron_moe_lpr.training.configuration.config import CheckpointOptions
from megatron_moe_lpr.training.run_directory.fall_back import iterations_in, latest_iteration

if TYPE_CHECKING:
    from megatron_moe_lpr.training.run_directory.resuming import OwnCheckpoint


def readable_load(options: CheckpointOptions) -> Path:
    """What --load means; where it is --save itself, its newest checkpoint whose small files seem intact.

    The newest one may be damaged, or not named by the latest file yet (`fall_back.latest_iteration`). Which one the run
    goes on from, and whether one is set aside, is decided when all ranks have met (`resuming.find_own_checkpoint`).

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
    """Open --load; where it is a checkpoint of this run itself, what the run began from.

    Args:
        stage: the run's, as the history in checkpoints calls it.

    Returns:
        The checkpoint that holds the weights the run does not train, and the card that the run began with.

    Raises:
        UserError: there is no such checkpoint, an incomplete one, or a damaged file.
    """
    start = open_checkpoint(options.load, options.verify, options.base_checkpoint)
    card = start.card()
    last = card.history[-1] if card.history else {}
    if (
        not _lies_in(start, options.save)
        or last.get("stage") != stage
        or not {"iterations", "train_iters"} <= set(last)
    ):
        return start, card
    base = base_of(start)
    return (start, card_at_start(card)) if base is None else (base, base.card())


def start_of(
    own: "OwnCheckpoint", start: CheckpointDirectory, card: CheckpointCard, save: Path
) -> tuple[CheckpointDirectory, CheckpointCard]:
    """What `open_start` returns, corrected by the checkpoint that the run goes on from. Every rank must call it.

    Raises:
        UserError: on every rank: what `own` does not hold is neither in `start` nor where it was.
    """
    card = card_at_start(own.card, card)
    if own.card.base is not None:
        return on_every_rank(lambda: _base(own, start))[dist.get_rank()], card
    # The one that --load named may have been set aside.
    return own.directory if _lies_in(start, save) else start, card


def card_at_start(own: CheckpointCard, start: CheckpointCard | None = None) -> CheckpointCard:
    """The card with which the run that wrote the card `own` began.

    Args:
        start: of what --load names now; its openness is kept where the run can have begun with it.
    """
    entry = own.history[-1]
    steps = opening_steps(entry.get("open_experts_iters"), entry.get("train_lengths", [entry["train_iters"]]))
    if start is not None and opened(start.openness, entry["iterations"], steps) == own.openness:
        openness = start.openness
    elif entry["iterations"] < steps:
        progress = entry["iterations"] / steps
        openness = min(1.0, max(0.0, (own.openness - progress) / (1.0 - progress)))
    else:
        # Open by now, from whatever it was; with the flag, less than 1.
        openness = own.openness if entry.get("open_experts_iters") is None else 0.0
    return dataclasses.replace(start or own, history=own.history[:-1], openness=openness)


def opening_steps(open_experts_iters: int | None, lengths: list[int]) -> int:
    """Steps in which a run opens the experts of the latest expansion; one that was lengthened as it began."""
    return open_experts_iters or max(1, lengths[0] // 10)


def opened(start: float, iteration: int, steps: int) -> float:
    """Weight of the latest expansion's experts in the routers during the step that ends at `iteration`."""
    return min(1.0, start + (1.0 - start) * iteration / steps)


def _base(own: "OwnCheckpoint", start: CheckpointDirectory) -> CheckpointDirectory:
    """`start` where it is the base of a checkpoint that holds only what trains, else the one that its card names."""
    reasons = []
    for path in (start.path, Path(own.card.base.path if own.card.base else "")):
        try:
            base = base_of(dataclasses.replace(own.directory, base_path=path))
        except UserError as error:
            reasons.append(str(error))
            continue
        return base or own.directory
    raise UserError(
        f"--save holds only what was trained, and neither --load nor the checkpoint that the run began from has the "
        f"rest ({'; '.join(reasons)}); give --load the one it began from"
    )


def _lies_in(checkpoint: CheckpointDirectory, save: Path) -> bool:
    return checkpoint.iteration is not None and checkpoint.path.parent == save.resolve()
