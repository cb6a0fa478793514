"""What Megatron's schedules do with the gradients when all micro-batches of a step are through."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads


def finalize_gradients(
    chunks: Sequence[DistributedDataParallel], tokens: torch.Tensor | None = None, **options: Any
) -> None:
    """Reduce the gradients over the ranks, and divide them by the step's number of tokens.

    Mirrors distributed/finalize_model_grads.py `finalize_model_grads`, which asks on the host whether there are tokens
    (`if num_tokens > 0`) and waits for the device to know. Here one takes the place of none, on the device.

    Args:
        tokens: with a loss, of this rank's micro-batches, int, on the device; known on the last pipeline stage. Becomes
            the number of all ranks.
        options: `finalize_model_grads`' own.
    """
    finalize_model_grads(chunks, None, **options)
    if tokens is None:
        return
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(tokens, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    dist.all_reduce(tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    for chunk in chunks:
        chunk.scale_gradients(1.0 / tokens.clamp(min=1))
