"""Train a stage of MoE-LPR: `torchrun --nproc-per-node N -m megatron_moe_lpr.pretrain --stage 1 ...`."""

import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_moe_lpr.lasting_output import outlast_readers
from megatron_moe_lpr.processes import end_with_parent, is_running
from megatron_moe_lpr.training.signals import EXIT_REQUEUE, stop_request

if TYPE_CHECKING:
    from megatron_moe_lpr.training.callbacks import Callback
    from megatron_moe_lpr.training.configuration.config import TrainingConfig
    from megatron_moe_lpr.training.run_directory.run_lock import RunLock
    from megatron_moe_lpr.training.watchdog.heartbeat import Heartbeat

# torch and what needs it take seconds to import, and a signal may arrive meanwhile: they are imported where used.

LAUNCHER = "MOE_LPR_LAUNCHER"
"""Environment variable with the process number of the launcher that started this worker."""
ORPHAN_SECONDS = 600
"""Time in which a worker whose launcher is gone must finish its step and save."""


def pretrain(config: "TrainingConfig", callbacks: "Sequence[Callback]" = ()) -> bool:
    """Train a stage. Every rank must call it.

    Args:
        callbacks: callbacks of this rank, see `training.callbacks`.

    Returns:
        False: the run was asked to stop and has saved.
    """
    from megatron_moe_lpr.checkpoint.format.chain import resolve_and_hold
    from megatron_moe_lpr.training.run_directory.run_lock import run_lock
    from megatron_moe_lpr.training.run_directory.run_start import readable_load
    from megatron_moe_lpr.training.run_directory.start_marker import mark_start, refuse_lost_directory
    from megatron_moe_lpr.training.watchdog.heartbeat import Heartbeat

    options = config.checkpoint
    # The heartbeat comes first: it also ends a run whose lock is on a disk that hangs.
    with Heartbeat(config.distributed_timeout_minutes * 60.0) as heartbeat:
        refuse_lost_directory(options.save, options.load)
        with (
            run_lock(options.save, options.take_over) as lock,
            resolve_and_hold(readable_load(options), options.base_checkpoint, check_at_end=False) as load,
        ):
            heartbeat.before_end = lock.release
            mark_start(options.save)
            started = dataclasses.replace(config, checkpoint=dataclasses.replace(options, load=load))
            return _train(started, config, lock, heartbeat, callbacks)


def _train(
    config: "TrainingConfig",
    given: "TrainingConfig",
    lock: "RunLock",
    heartbeat: "Heartbeat",
    callbacks: "Sequence[Callback]",
) -> bool:
    """Build the run, write its config.json, train, and print how it started and ended."""
    import torch.distributed as dist

    from megatron_moe_lpr.liveness import long_work
    from megatron_moe_lpr.training.callbacks import Callbacks
    from megatron_moe_lpr.training.configuration.config_file import config_values, write_run_config
    from megatron_moe_lpr.training.configuration.rank_notes import count_ranks, rank_notes, read_ranks
    from megatron_moe_lpr.training.configuration.schedule_notes import schedule_notes
    from megatron_moe_lpr.training.logs.metrics import MetricsWriter
    from megatron_moe_lpr.training.loop import Trainer
    from megatron_moe_lpr.training.overview import print_overview
    from megatron_moe_lpr.training.run_directory.start_marker import mount_point
    from megatron_moe_lpr.training.run_log import LossWarnings, RunLog
    from megatron_moe_lpr.training.run_saver import RunSaver
    from megatron_moe_lpr.training.setup import prepare

    with long_work("setting up"):
        run = prepare(config)
    save, step = config.checkpoint.save, run.state.iteration
    ranks, ranks_before = count_ranks(config, dist.get_world_size()), read_ranks(save)
    if dist.get_rank() == 0:
        write_run_config(given, ranks)
    settings = {**config_values(run.config), **run.description}
    writer = MetricsWriter(config.logging, save, f"stage {config.stage.stage}", step, settings)
    print_overview(run)
    if step:
        writer.say(f"resuming from step {step:,} in {save}")
        for note in rank_notes(ranks_before, ranks, config.batch.global_batch_size):
            writer.say(note)
    else:
        writer.say(f"beginning at step 0: no checkpoint in {save} (file system mounted at {mount_point(save)})")
    for note in schedule_notes(run.config, step, run.resume_from.recorded if run.resume_from else None):
        writer.say(note)
    try:
        called = Callbacks([LossWarnings(writer), RunLog(run, writer)], callbacks)
        finished = Trainer(run, writer, RunSaver(run, lock, writer.say), heartbeat, called).train()
    finally:
        writer.close()
    step = run.state.iteration
    writer.say("done" if finished else f"stopped by request after step {step:,}; start again to go on")
    return finished


def main() -> None:
    """Command line."""
    stop = stop_request(nothing_to_save=True)
    outlast_readers()
    _end_with_launcher()
    try:
        finished = _run()
    except BaseException:
        # Other ranks that ended for the same signal make this rank's start or first step fail in many ways.
        if stop.received and not stop.has_stepped:
            _leave_at_once(stop.received)
        raise
    if not finished:
        sys.exit(EXIT_REQUEUE)


def _run() -> bool:
    from megatron_moe_lpr.errors import run_command
    from megatron_moe_lpr.training.configuration.config_file import parse_training_flags

    config = parse_training_flags(description=__doc__)
    finished = True

    def command() -> None:
        nonlocal finished
        from megatron_moe_lpr.parallel.groups import destroy_parallel

        finished = pretrain(config)
        destroy_parallel()

    run_command(command)
    return finished


def _end_with_launcher() -> None:
    """Make a worker save and end when its launcher or torchrun is gone; a process started by hand is left alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))
    # With a script in between, the parent is that script.
    parent = os.getppid() if is_running(launcher) else launcher
    end_with_parent(signal.SIGTERM, parent, grace=ORPHAN_SECONDS)


def _leave_at_once(received: signal.Signals) -> None:
    """End the process without Python's shutdown, which would wait for threads that wait for other ranks."""
    print(f"stopped by {received.name} before the first step: nothing to save; start again to go on", flush=True)
    sys.stderr.flush()
    os._exit(EXIT_REQUEUE)


if __name__ == "__main__":
    main()
