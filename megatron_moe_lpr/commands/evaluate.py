"""Evaluate a checkpoint: loss, perplexity and bits per byte of each validation dataset, and where tokens are routed.

Runs alone or under torchrun at any layout: `torchrun --nproc-per-node 2 tools/evaluate.py --load DIR ...`.
"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.data.manifest import dataset_files
from megatron_moe_lpr.errors import naming, run_command
from megatron_moe_lpr.files.filesystem import atomic_file, check_output_file
from megatron_moe_lpr.flag_ranges import PositiveInt
from megatron_moe_lpr.parallel.layout import ParallelLayout, check_timeout
from megatron_moe_lpr.platform import PlatformName

if TYPE_CHECKING:
    from megatron_moe_lpr.evaluation.checkpoint import EvaluationPlan


@dataclasses.dataclass(frozen=True)
class Flags:
    """Evaluate a checkpoint."""

    load: Path
    """Checkpoint directory, dense or MoE, or one iteration in it."""
    valid_data_path: list[str]
    """Datasets: prefixes, each evaluated by itself, whole and in order."""
    base_checkpoint: Path | None = None
    """For a --load of --save-trainable-only: directory of the checkpoint that its run started from, if it has moved."""
    original_languages: list[str] = dataclasses.field(default_factory=list)
    """Languages that the dense model already knows. Those in the checkpoint's history need not be named."""
    output: Path | None = None
    """Write the results to this file as JSON too."""
    seq_length: PositiveInt = 512
    """Tokens of a sequence, which bounds the context of a prediction."""
    micro_batch_size: PositiveInt = 4
    """Sequences a data-parallel rank computes at once."""
    bf16: bool = False
    """Compute in bfloat16. Default: what the last run computed in, or the checkpoint's own dtype; for a float16 one
    bfloat16. CPUs without bf16 instructions compute in fp32 by default."""
    fp32: bool = False
    """Compute in fp32."""
    fp16: bool = False
    """Not offered: give --bf16 or --fp32."""
    layout: tyro.conf.OmitArgPrefixes[ParallelLayout] = dataclasses.field(default_factory=ParallelLayout)
    verify: bool = True
    """Compare the checkpoint's files with their checksums before use."""
    platform: PlatformName = "auto"
    """Where to run. auto: CUDA if there is a device."""
    distributed_timeout_minutes: Annotated[PositiveInt, tyro.conf.arg(name="distributed-timeout-minutes")] = 10
    """A collective operation that takes longer ends the command; so does nine tenths of this time without progress."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    check_timeout(flags.distributed_timeout_minutes)
    if flags.output:
        check_output_file(flags.output, "--output", dataset_files(flags.valid_data_path))
    evaluate(flags, show=True)


def evaluate(flags: Flags, show: bool = False) -> dict[str, Any]:
    """Return what was found, as JSON has it, on every rank. Raises UserError.

    Args:
        show: print it on rank 0.
    """
    # torch and Megatron take seconds to import, and the checks of flags do without.
    import torch.distributed as dist

    from megatron_moe_lpr.evaluation.checkpoint import evaluate_checkpoint
    from megatron_moe_lpr.evaluation.results import evaluation_record, print_evaluation
    from megatron_moe_lpr.parallel.groups import destroy_parallel
    from megatron_moe_lpr.training.watchdog.heartbeat import Heartbeat

    with Heartbeat(flags.distributed_timeout_minutes * 60.0):
        evaluation = evaluate_checkpoint(plan(flags))
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


def plan(flags: Flags) -> "EvaluationPlan":
    """Flags as the evaluation takes them. Raises UserError where they contradict each other."""
    from megatron_moe_lpr.evaluation.checkpoint import EvaluationPlan
    from megatron_moe_lpr.model.configuration.dtype import asked_dtype

    dtype = asked_dtype(flags.bf16, flags.fp32, flags.fp16)
    fields = {field.name for field in dataclasses.fields(EvaluationPlan)} - {"dtype"}
    return EvaluationPlan(dtype=dtype, **{name: getattr(flags, name) for name in fields})


def write(record: dict, path: Path) -> None:
    """The JSON file, whole or not at all."""
    with naming(path), atomic_file(path) as partial:
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":  # torchrun -m, as `moe-lpr launch` starts its ranks
    run_command(main)
