"""Loss, perplexity, bits per byte and routing of validation text."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from megatron.core import parallel_state

from megatron_moe_lpr.data.reading.batches import build_validation_iterator, count_validation_micro_batches
from megatron_moe_lpr.data.reading.validation_dataset import PackedValidationDataset, ValidationDataset
from megatron_moe_lpr.engine.micro_batches import LossSums, run_micro_batches, to_device
from megatron_moe_lpr.engine.routing import collect_routing, counted_apart
from megatron_moe_lpr.model.configuration.config import ModelShape, MoELPRConfig
from megatron_moe_lpr.model.moe.routing_statistics import RoutingReport

MAX_PASS_SIZE = 8
"""Largest number of micro-batches in one pass through the pipeline's schedule: enough to fill it."""


@dataclasses.dataclass(frozen=True)
class DatasetLoss:
    """Results of a model on one validation dataset."""

    name: str
    language: str
    loss: float
    """Mean of -ln p over the tokens with loss mask 1; NaN if the part that was evaluated has none."""
    tokens: int
    bits_per_byte: float | None
    """Bits per byte of the whole text, with any loss mask, of conversations of what counts in the loss; None if only a
    part of the dataset, whose bytes are not known, was evaluated."""
    routing: RoutingReport | None
    """Routing in each layer; None for a dense model."""
    new_token_mass: float | None = None
    """Mean probability that all new tokens together took; None for a model without a vocabulary extension."""
    is_packed: bool = False
    """Whether samples held whole documents (best-fit packing)."""
    documents_apart: bool = False
    """Whether no document saw another."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity if that is too large for a float."""
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
    language_group: torch.Tensor,
    device: torch.device,
    micro_batch_size: int,
    after_pass: Callable[[], bool] | None = None,
) -> DatasetLoss | None:
    """Evaluate a model on one dataset, at any layout. Every rank must call it.

    Args:
        chunks: this rank's chunks of the model; set to evaluation mode.
        language_group: int64 [languages + 1], see `LanguageRegistry.group_table`.
        after_pass: called on every rank after each pass through the schedule; true if this rank has to stop.

    Returns:
        The same result on all ranks; None if `after_pass` was true on any rank, since all stop then.
    """
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    pass_size = _pass_size(count_validation_micro_batches(dataset, micro_batch_size, size))
    passes = count_validation_micro_batches(dataset, micro_batch_size, size, pass_size) // pass_size
    batches = build_validation_iterator(dataset, micro_batch_size, rank, size, pass_size)
    for chunk in chunks:
        chunk.eval()

    total: LossSums | None = None
    with counted_apart(chunks):
        for _ in range(passes):
            part = [to_device(batch, device) for batch in itertools.islice(batches, pass_size)]
            rank_sums = run_micro_batches(chunks, config, part, language_group, forward_only=True)
            sums = rank_sums.reduced_unless_stopped(after_pass is not None and after_pass())
            if sums is None:  # a rank has to stop
                return None
            total = sums if total is None else total + sums
        assert total is not None  # every dataset has a token to predict
        return _result(dataset, total, collect_routing(chunks, shape) if config.num_moe_experts else None)


def _result(dataset: ValidationDataset, total: LossSums, routing: RoutingReport | None) -> DatasetLoss:
    mass = total.new_token_mass
    losses = total.loss if dataset.bits_of_loss else total.text_loss
    bits = float(losses.sum()) / math.log(2) if losses is not None else None
    return DatasetLoss(
        name=dataset.name,
        language=dataset.language,
        loss=total.mean,
        tokens=int(total.tokens.sum()),
        bits_per_byte=bits / dataset.text_bytes if bits is not None and dataset.text_bytes else None,
        routing=routing,
        new_token_mass=float(mass.sum() / total.tokens.sum()) if mass is not None and total.tokens.any() else None,
        is_packed=isinstance(dataset, PackedValidationDataset),
        documents_apart=dataset.documents_apart.reset_attention_mask,
    )


def _pass_size(needed: int) -> int:
    """Return the number of micro-batches in a pass: 1 without a pipeline, else enough to fill it, `needed` at most.

    An interleaved schedule takes multiples of its pipeline ranks.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    interleaved = parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None
    multiple = pipeline if interleaved else 1
    return math.ceil(min(MAX_PASS_SIZE if pipeline > 1 else 1, needed) / multiple) * multiple
