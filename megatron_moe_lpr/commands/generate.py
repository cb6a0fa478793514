"""Continue a prompt, or answer in a conversation, with a checkpoint or an export.

Only the text goes to standard output, as it comes; the speed goes to standard error. Runs alone or on several ranks at
any layout: `moe-lpr launch --nproc-per-node 2 generate --load DIR ...`.
"""

import dataclasses
import os
import sys
from typing import TYPE_CHECKING

import tyro

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import INTERRUPTED_CODE, run_command
from megatron_moe_lpr.generation.options import GenerationOptions
from megatron_moe_lpr.parallel.layout import check_timeout

if TYPE_CHECKING:
    from megatron_moe_lpr.generation.output import Answer


@dataclasses.dataclass(frozen=True)
class Flags:
    """Generate text."""

    generation: tyro.conf.OmitArgPrefixes[GenerationOptions]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    check_timeout(flags.generation.model.distributed_timeout_minutes)
    try:
        generate(flags, show=True)
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", 0)) == 0:
            raise
        sys.exit(INTERRUPTED_CODE)  # rank 0 says it for all


def generate(flags: Flags, show: bool = False) -> "list[Answer]":
    """Generate and return what was added to each prompt, on every rank. Raises UserError.

    Args:
        show: print on rank 0.
    """
    # torch and Megatron take seconds to import, which checking the flags does not need.
    from megatron_moe_lpr.generation.answering import answer
    from megatron_moe_lpr.generation.checkpoint import open_checkpoint_model
    from megatron_moe_lpr.generation.hugging_face import open_hugging_face_model
    from megatron_moe_lpr.generation.output import write_utf8
    from megatron_moe_lpr.parallel.groups import destroy_parallel
    from megatron_moe_lpr.training.watchdog.heartbeat import Heartbeat

    options = flags.generation
    if show:
        write_utf8()
    opened = open_checkpoint_model if options.model.hf is None else open_hugging_face_model
    with Heartbeat(options.model.distributed_timeout_minutes * 60.0), opened(options.model) as model:
        found = answer(model, options, show)
    destroy_parallel()
    return found


if __name__ == "__main__":  # `moe-lpr launch` starts its ranks by torchrun -m
    run_command(main)
