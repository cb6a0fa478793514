"""One forward pass at any layout, outside of training."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_moe_lpr.model.configuration.config import MoELPRConfig
from megatron_moe_lpr.parallel.context import all_tokens, own_tokens


def compute_logits(
    chunks: Sequence[torch.nn.Module],
    config: MoELPRConfig,
    tokens: torch.Tensor,
    vocab_size: int,
    *,
    cu_seqlens: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: StaticInferenceContext | None = None,
) -> torch.Tensor:
    """Logits of a batch, the same on every rank. Every rank must call it, with the same tokens on all of them.

    Args:
        chunks: this rank's part of the model.
        tokens: [batch, sequence].
        vocab_size: columns to keep; the padded vocabulary has more.
        cu_seqlens: documents that do not see each other, see `MoELPRModel.forward`.
        position_ids: [batch, sequence]; None: counted from 0 in each sample, or on from the cache's tokens.
        cache: keys and values of the tokens before these, to which those of these are added (see `model/decoding.py`);
            None: the tokens begin a text.

    Returns:
        [batch, sequence, vocab_size], fp32, on the platform's device; with a cache only of the last token,
        [batch, 1, vocab_size].
    """
    batch, sequence = tokens.shape
    context = parallel_state.get_context_parallel_group()
    first = cache.sequence_len_offset if cache else 0
    collected: list[torch.Tensor] = []

    def step(iterator: object, model: torch.nn.Module) -> tuple:
        given = {"inference_context": cache, "runtime_gather_output": True, "cu_seqlens": cu_seqlens}
        return model(own_tokens(tokens, 1, context), own_tokens(positions, 1, context), None, **given), _keep

    def _keep(output: torch.Tensor, non_loss_data: bool = False) -> torch.Tensor:
        logits = output[..., :vocab_size].float()
        if context.size() > 1:
            logits = all_tokens(logits.transpose(0, 1), context).transpose(0, 1)
        collected.append(logits.contiguous())
        return output

    counted = torch.arange(first, first + sequence, device=tokens.device).expand(batch, -1)
    positions = counted if position_ids is None else position_ids
    shape = (batch, sequence) if cu_seqlens is None else (1, batch * sequence)
    for chunk in chunks:
        chunk.eval()
    interleaved = len(chunks) > 1
    forward = get_forward_backward_func()
    forward(
        forward_step_func=step,
        data_iterator=[None] * len(chunks) if interleaved else None,
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=parallel_state.get_pipeline_model_parallel_world_size() if interleaved else 1,
        seq_length=shape[1],
        micro_batch_size=shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    logits = (
        collected[0] if collected else torch.empty(batch, 1 if cache else sequence, vocab_size, device=tokens.device)
    )
    dist.broadcast(
        logits,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return logits
