"""Evaluate a checkpoint: loss, perplexity and bits per byte of each validation dataset, and where tokens are routed.

Runs alone or on several ranks at any layout: `moe-lpr launch --nproc-per-node 2 evaluate --load DIR ...`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.data.manifest import dataset_files
from megatron_moe_lpr.errors import name_file_in_oserror, run_command
from megatron_moe_lpr.evaluation.options import EvaluationOptions
from megatron_moe_lpr.files.atomic_file import check_output_file
from megatron_moe_lpr.files.json_files import write_json
from megatron_moe_lpr.parallel.layout import check_timeout


@dataclasses.dataclass(frozen=True)
class Flags:
    """Evaluate a checkpoint."""

    evaluation: tyro.conf.OmitArgPrefixes[EvaluationOptions]
    output: Path | None = None
    """Write the results to this file as JSON too."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    check_timeout(flags.evaluation.distributed_timeout_minutes)
    if flags.output:
        check_output_file(flags.output, "--output", dataset_files(flags.evaluation.valid_data_path))
    evaluate(flags, show=True)


def evaluate(flags: Flags, show: bool = False) -> dict[str, Any]:
    """Evaluate and return the record of the results, on every rank. Raises UserError.

    Args:
        show: print the results on rank 0.
    """
    # torch and Megatron take seconds to import, which checking the flags does not need.
    import torch.distributed as dist

    from megatron_moe_lpr.evaluation.checkpoint import evaluate_checkpoint
    from megatron_moe_lpr.evaluation.results import evaluation_record, print_evaluation
    from megatron_moe_lpr.parallel.groups import destroy_parallel
    from megatron_moe_lpr.training.watchdog.heartbeat import Heartbeat

    with Heartbeat(flags.evaluation.distributed_timeout_minutes * 60.0):
        evaluation = evaluate_checkpoint(flags.evaluation)
    record = evaluation_record(evaluation)
    if dist.get_rank() == 0:
        for note in evaluation.notes if show else ():
            print(f"note: {note}")
        if show:
            print_evaluation(record)
        if flags.output:
            write(record, flags.output)
    destroy_parallel()
    return record


def write(record: dict, path: Path) -> None:
    """Write a JSON file, which appears whole or not at all."""
    with name_file_in_oserror(path):
        write_json(record, path)


if __name__ == "__main__":  # `moe-lpr launch` starts its ranks by torchrun -m
    run_command(main)
