"""Checkpoints of a run: which step has one, what a card says, and what is removed when a new one is complete."""

import contextlib
from collections.abc import Callable, Iterator

import torch.distributed as dist

from megatron_moe_lpr.checkpoint.format.retention import remove_superfluous
from megatron_moe_lpr.checkpoint.format.trainable_only import layers_of, reading, record_base
from megatron_moe_lpr.checkpoint.saving.saver import CheckpointSaver, Saved, remove_partial
from megatron_moe_lpr.training.checkpointing import expect_saves, start_save
from megatron_moe_lpr.training.run_directory.run_lock import RunLock
from megatron_moe_lpr.training.setup import Run, card_of


class RunSaver:
    """Saves the steps of a run. Every rank makes one and calls its methods in the same order; they raise UserError, on
    every rank with the reason, where a checkpoint cannot be written."""

    def __init__(self, run: Run, lock: RunLock, say: Callable[[str], None]) -> None:
        """Remove what a killed run left behind, and start the process that writes beside training, if one is to.

        Args:
            lock: of the directory, checked before each save.
            say: prints a line on rank 0: what was removed.
        """
        self.run, self.lock, self.say = run, lock, say
        self.saver = self._saver()
        # Only rank 0 writes cards.
        is_partial = run.config.checkpoint.save_trainable_only and dist.get_rank() == 0
        self.base = record_base(run.model.directory) if is_partial else None
        self.saved_iteration = run.state.iteration if run.state.iteration else None

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the files that a save needs; after the block no process is left, and a save under way is given up."""
        try:
            # Each checkpoint takes files of the one that the run started from.
            with reading(self.run.model.directory):
                yield
        finally:
            self.saver.close()

    @property
    def is_up_to_date(self) -> bool:
        """Whether this step has a checkpoint, complete or under way."""
        return self.saved_iteration == self.run.state.iteration

    def expect(self) -> None:
        """Prepare for saves, after the first step of this start."""
        expect_saves(self.saver, self.run.state, self.run.config.checkpoint.save_trainable_only)

    def poll(self) -> Saved | None:
        """Complete the save under way if all ranks have written."""
        return self.saver.poll()

    def wait(self) -> Saved | None:
        """Complete the save under way, waiting for it."""
        return self.saver.wait()

    def make_way(self) -> Saved | None:
        """Prepare to `start`: complete the save before. Raises UserError where another run has the directory now."""
        self.lock.check()
        return self.saver.wait()

    def start(self) -> Saved | None:
        """Begin to save this step; return the checkpoint where it is complete already."""
        run = self.run
        card, trainable_only = card_of(run, self.base), run.config.checkpoint.save_trainable_only
        saved = start_save(self.saver, run.state, run.model.directory, card, trainable_only)
        self.saved_iteration = run.state.iteration
        return saved

    def _saver(self) -> CheckpointSaver:
        options = self.run.config.checkpoint
        if dist.get_rank() == 0:
            remove_partial(options.save)

        def tidy(newest: int) -> None:
            kept = [layer.path for layer in layers_of(self.run.model.directory)]
            for note in remove_superfluous(options.save, newest, options.retention, kept):
                self.say(note)

        return CheckpointSaver(options.save, options.async_save, tidy, self.run.state.frozen)
