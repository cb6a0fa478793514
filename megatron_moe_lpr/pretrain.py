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

# What a run is made of takes seconds to import, and a signal may arrive meanwhile: it is imported where it is used.

LAUNCHER = "MOE_LPR_LAUNCHER"
"""Environment variable: process number of the launcher that started this worker."""
ORPHAN_SECONDS = 600
"""How long a worker whose launcher is gone may take to finish its step and save."""


def pretrain(config: "TrainingConfig", callbacks: "Sequence[Callback]" = ()) -> bool:
    """Run a stage; False: it was asked to stop and has saved.

    Args:
        callbacks: called by this rank, see `training.callbacks`.
    """
    from megatron_moe_lpr.checkpoint.format.trainable_only import kept_for_reading
    from megatron_moe_lpr.training.run_directory.run_lock import run_lock
    from megatron_moe_lpr.training.run_directory.run_start import readable_load
    from megatron_moe_lpr.training.run_directory.start_marker import mark_start, refuse_lost_directory
    from megatron_moe_lpr.training.watchdog.heartbeat import Heartbeat

    options = config.checkpoint
    # First of all, so that it also ends a run whose lock lies on a disk that does not answer.
    with Heartbeat(config.distributed_timeout_minutes * 60.0) as heartbeat:
        refuse_lost_directory(options.save, options.load)
        with (
            run_lock(options.save, options.take_over) as lock,
            kept_for_reading(readable_load(options), options.base_checkpoint, to_the_end=False) as load,
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
    """Build the run, write down what it was given, train, and say how it began and ended."""
    import torch.distributed as dist

    from megatron_moe_lpr.liveness import long_work
    from megatron_moe_lpr.training.callbacks import Callbacks
    from megatron_moe_lpr.training.configuration.config_file import config_values, write_run_config
    from megatron_moe_lpr.training.configuration.schedule_notes import schedule_notes
    from megatron_moe_lpr.training.logs.metrics import MetricsWriter
    from megatron_moe_lpr.training.loop import Trainer
    from megatron_moe_lpr.training.run_directory.start_marker import mount_point
    from megatron_moe_lpr.training.run_log import LossWarnings, RunLog
    from megatron_moe_lpr.training.setup import prepare, print_overview

    with long_work("setting up"):
        run = prepare(config)
    save, step = config.checkpoint.save, run.state.iteration
    if dist.get_rank() == 0:
        write_run_config(given, dist.get_world_size(), config.layout.data_parallel_size(dist.get_world_size()))
    settings = {**config_values(run.config), **run.description}
    writer = MetricsWriter(config.logging, save, f"stage {config.stage.stage}", step, settings)
    print_overview(run)
    if step:
        writer.say(f"resuming from step {step:,} in {save}")
    else:
        writer.say(f"beginning at step 0: no checkpoint in {save} (file system mounted at {mount_point(save)})")
    for note in schedule_notes(run.config, step, run.own.recorded if run.own else None):
        writer.say(note)
    try:
        called = Callbacks([LossWarnings(writer), RunLog(run, writer)], callbacks)
        finished = Trainer(run, writer, lock, heartbeat, called).train()
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
        # Peers that left for the same signal make this rank's start and first step fail in many ways.
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
    """A worker whose launcher or torchrun is gone saves and leaves. One that a person started stays."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))
    # Where a script stands between, that is the parent.
    parent = os.getppid() if is_running(launcher) else launcher
    end_with_parent(signal.SIGTERM, parent, grace=ORPHAN_SECONDS)


def _leave_at_once(received: signal.Signals) -> None:
    """Without Python's own end, which would wait for threads that wait for peers."""
    print(f"stopped by {received.name} before the first step: nothing to save; start again to go on", flush=True)
    sys.stderr.flush()
    os._exit(EXIT_REQUEUE)


if __name__ == "__main__":
    main()
