"""Sums a step's gradients over ranks and divides by tokens; Megatron's schedules call it after the last backward."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.distributed.finalize_model_grads import _allreduce_embedding_grad

from megatron_moe_lpr.model.build import unwrap


def finalize_gradients(
    chunks: Sequence[DistributedDataParallel], tokens: torch.Tensor | None = None, **options: Any
) -> None:
    """Reduce the gradients over the ranks, and divide them by the step's number of tokens.

    Mirrors distributed/finalize_model_grads.py `finalize_model_grads`, which compares the number of tokens with 0 on
    the host (`if num_tokens > 0`) and so waits for the device. Here 0 is replaced by 1, on the device.

    Args:
        tokens: number of tokens with a loss in this rank's micro-batches, int, on the device; known on the last
            pipeline rank. Changed in place to the number of all ranks.
        options: further arguments of `finalize_model_grads`.
    """
    finalize_model_grads(chunks, None, **options)
    _sum_tied_new_rows(chunks)
    if tokens is None:
        return
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(tokens, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    dist.all_reduce(tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    for chunk in chunks:
        chunk.scale_gradients(1.0 / tokens.clamp(min=1))


def _sum_tied_new_rows(chunks: Sequence[DistributedDataParallel]) -> None:
    """Sum gradients of tied new rows of the vocabulary over the first and the last pipeline rank, which both hold them.

    `finalize_model_grads` does so for the base model's rows alone. Frozen rows have no gradient and are left out.
    """
    group = parallel_state.get_embedding_group(check_initialized=False)
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    model = unwrap(chunks[0])
    extensions = model.vocabulary.extensions if model.share_embeddings_and_output_weights else ()
    for part, _ in enumerate(extensions):
        _allreduce_embedding_grad(chunks, group, pipeline, lambda model, part=part: unwrap(model).new_rows[part])
