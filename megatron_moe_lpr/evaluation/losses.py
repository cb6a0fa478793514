"""Loss, perplexity and bits per byte of validation text, and where its tokens are routed."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from megatron.core import parallel_state

from megatron_moe_lpr.data.reading.batches import build_validation_iterator, count_validation_micro_batches
from megatron_moe_lpr.data.reading.validation_dataset import ValidationDataset
from megatron_moe_lpr.engine.micro_batches import LossSums, run_micro_batches, to_device
from megatron_moe_lpr.engine.routing import collect_routing, counted_apart
from megatron_moe_lpr.model.configuration.config import ModelShape, MoELPRConfig
from megatron_moe_lpr.model.moe.routing_statistics import RoutingReport

MICRO_BATCHES_A_PASS = 8
"""Micro-batches that go through the schedule of a pipeline together, at most: enough to fill it."""


@dataclasses.dataclass(frozen=True)
class DatasetLoss:
    """What the model makes of one validation dataset."""

    name: str
    language: str
    loss: float
    """Mean of -ln p over the tokens that the loss mask keeps."""
    tokens: int
    bits_per_byte: float | None
    """Of the whole text, whatever the loss mask; None where only a part of the dataset was used: its bytes are not
    known."""
    routing: RoutingReport | None
    """None for a dense model."""

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that is too large for a float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


@torch.no_grad()
def evaluate_dataset(
    chunks: Sequence[torch.nn.Module],
    config: MoELPRConfig,
    shape: ModelShape,
    dataset: ValidationDataset,
    original_table: torch.Tensor,
    device: torch.device,
    micro_batch_size: int,
    after_pass: Callable[[], bool] | None = None,
) -> DatasetLoss | None:
    """Run one dataset forward, at any layout. Every rank must call it; all get the same result.

    Args:
        original_table: bool [languages + 1], whether a language is original; the last entry is padding's.
        after_pass: called on every rank whenever micro-batches have gone through the schedule: whether this rank is to
            leave.

    Returns:
        None: a rank was to leave, so that all have left. There is no mean over the part that was computed.
    """
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    together = _micro_batches_a_pass(count_validation_micro_batches(dataset, micro_batch_size, size))
    passes = count_validation_micro_batches(dataset, micro_batch_size, size, together) // together
    batches = build_validation_iterator(dataset, micro_batch_size, rank, size, together)
    for chunk in chunks:
        chunk.eval()

    total: LossSums | None = None
    with counted_apart(chunks):
        for _ in range(passes):
            part = [to_device(batch, device) for batch in itertools.islice(batches, together)]
            of_rank = run_micro_batches(chunks, config, part, original_table, forward_only=True)
            sums = of_rank.over_ranks_that_stay(after_pass is not None and after_pass())
            if sums is None:
                return None
            total = sums if total is None else total + sums
        assert total is not None  # every dataset has a token to predict
        routing = collect_routing(chunks, shape) if config.num_moe_experts else None
    bits = float(total.text_loss.sum()) / math.log(2) if total.text_loss is not None else None
    return DatasetLoss(
        name=dataset.name,
        language=dataset.language,
        loss=total.mean,
        tokens=int(total.tokens.sum()),
        bits_per_byte=bits / dataset.text_bytes if bits is not None and dataset.text_bytes else None,
        routing=routing,
    )


def _micro_batches_a_pass(needed: int) -> int:
    """One without a pipeline; several to fill a pipeline, for an interleaved schedule a multiple of its ranks.

    Args:
        needed: micro-batches of the dataset.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    interleaved = parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None
    multiple = pipeline if interleaved else 1
    return math.ceil(min(MICRO_BATCHES_A_PASS if pipeline > 1 else 1, needed) / multiple) * multiple
