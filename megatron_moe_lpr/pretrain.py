"""Train a stage of MoE-LPR: `torchrun --nproc-per-node N -m megatron_moe_lpr.pretrain --stage 1 ...`."""

import sys

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import run_command
from megatron_moe_lpr.parallel.groups import destroy_parallel
from megatron_moe_lpr.training.config import TrainingConfig
from megatron_moe_lpr.training.loop import Trainer
from megatron_moe_lpr.training.metrics import MetricsWriter
from megatron_moe_lpr.training.setup import prepare, print_overview
from megatron_moe_lpr.training.signals import EXIT_REQUEUE


def pretrain(config: TrainingConfig) -> bool:
    """Run a stage; False: it was asked to stop and has saved."""
    run = prepare(config)
    writer = MetricsWriter(config.logging, config.checkpoint.save, f"stage {config.stage.stage}", run.state.iteration)
    print_overview(run)
    if run.state.iteration:
        writer.say(f"resuming from step {run.state.iteration:,} in {config.checkpoint.save}")
    try:
        finished = Trainer(run, writer).train()
    finally:
        writer.close()
    writer.say("done" if finished else f"stopped by request after step {run.state.iteration:,}; start again to go on")
    return finished


def main() -> None:
    """Command line."""
    config = parse_flags(TrainingConfig, description=__doc__)
    finished = True

    def command() -> None:
        nonlocal finished
        finished = pretrain(config)
        destroy_parallel()

    run_command(command)
    if not finished:
        sys.exit(EXIT_REQUEUE)


if __name__ == "__main__":
    main()
