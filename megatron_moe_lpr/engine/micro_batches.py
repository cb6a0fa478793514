"""One global batch through Megatron's schedule, for training and evaluation: losses normalised over all of it."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_moe_lpr.data.reading.batches import Batch
from megatron_moe_lpr.liveness import advance, waiting_for
from megatron_moe_lpr.model.configuration.config import MoELPRConfig
from megatron_moe_lpr.model.moe.token_tags import token_tags


@dataclasses.dataclass(frozen=True)
class StepWeights:
    """What one token weighs in the router's losses, so that the sum over the step is a mean over its global batch.

    Megatron divides every gradient by the number of tokens with a loss (`calculate_per_token_loss`), so the weights
    carry that number as a factor.
    """

    lpr: torch.Tensor
    """Tokens with a loss / tokens of languages that have a prior; 0 where there is none."""
    micro_batch: torch.Tensor
    """Tokens with a loss / micro-batches of the step."""


@dataclasses.dataclass(frozen=True)
class LossSums:
    """LM loss of a step: `over_ranks` makes the sums of all ranks of one rank's."""

    loss: torch.Tensor
    """[languages], fp64: summed loss of the tokens with that language's tag."""
    tokens: torch.Tensor
    """[languages], fp64."""
    text_loss: torch.Tensor | None = None
    """[languages], fp64: `loss` with the tokens of the text that the loss mask leaves out; None: not summed."""

    @property
    def mean(self) -> float:
        """Loss per token over all languages."""
        return (self.loss.sum() / self.tokens.sum()).item()

    def of_language(self, language: int) -> float:
        """Loss per token of one language; NaN where there was none."""
        return (self.loss[language] / self.tokens[language]).item()

    def by_language(self, names: Sequence[str]) -> dict[str, float]:
        """Loss per token of each language that has a token, by its name."""
        return {name: self.of_language(index) for index, name in enumerate(names) if self.tokens[index] > 0}

    def __add__(self, other: "LossSums") -> "LossSums":
        text_loss = None
        if self.text_loss is not None and other.text_loss is not None:
            text_loss = self.text_loss + other.text_loss
        return LossSums(self.loss + other.loss, self.tokens + other.tokens, text_loss)

    def over_ranks_that_stay(self, leaves: bool) -> "LossSums | None":
        """`over_ranks`, or None on every rank where any of them leaves: both are agreed on at once."""
        parts = [part for part in (self.loss, self.tokens, self.text_loss) if part is not None]
        flag = torch.full((1,), float(leaves), dtype=self.loss.dtype, device=self.loss.device)
        total = torch.cat((*parts, flag))
        with waiting_for("the losses of all ranks", on_peers=True):
            dist.all_reduce(total)
            *sums, leaving = total.cpu().split((*map(len, parts), 1))
        return None if leaving.item() else LossSums(*sums)

    def over_ranks(self) -> "LossSums":
        """Summed over all ranks, on the host, which waits for the device. Every rank must call it."""
        total = torch.stack([part for part in (self.loss, self.tokens, self.text_loss) if part is not None])
        with waiting_for("the losses of all ranks", on_peers=True):
            dist.all_reduce(total)
            return LossSums(*total.cpu())


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to where the model is."""
    return {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}


def step_weights(batches: Sequence[Batch], original_table: torch.Tensor) -> StepWeights:
    """Count the tokens of the whole step: this rank's micro-batches, then all data-parallel ranks.

    Args:
        batches: this rank's micro-batches.
        original_table: bool [languages + 1], whether a language is original; or int, the group of each language that
            has a prior, else -1 (`LanguageRegistry.group_table`). The last entry is padding's.
    """
    device = batches[0]["tokens"].device
    with_loss = torch.stack([batch["loss_mask"].sum() for batch in batches]).sum()
    has_prior = _groups(original_table) >= 0
    original = torch.stack([has_prior[batch["language"]].sum() for batch in batches]).sum()
    # `full` and not `tensor`: the host waits for the device where it copies a number of its own there.
    micro_batches = torch.full((), float(len(batches)), device=device)
    counts = torch.stack((with_loss.double(), original.double(), micro_batches))
    dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    tokens, originals, micro_batches = counts.float().unbind()
    lpr = torch.where(originals > 0, tokens / originals.clamp(min=1.0), 0.0)
    return StepWeights(lpr, tokens / micro_batches)


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    config: MoELPRConfig,
    batches: Sequence[Batch],
    original_table: torch.Tensor,
    forward_only: bool = False,
) -> LossSums:
    """Forward and, unless `forward_only`, backward of all micro-batches. Every rank must call it.

    Returns:
        The summed LM losses, the same on every rank, on the host. Arguments: see `run_micro_batches`.
    """
    return run_micro_batches(chunks, config, batches, original_table, forward_only).over_ranks()


def run_micro_batches(
    chunks: Sequence[torch.nn.Module],
    config: MoELPRConfig,
    batches: Sequence[Batch],
    original_table: torch.Tensor,
    forward_only: bool = False,
) -> LossSums:
    """The same without a look at the losses, for which the host would wait. Every rank must call it.

    Args:
        chunks: this rank's part of the model.
        batches: this rank's micro-batches on the model's device, [batch, sequence] each.
        original_table: see `step_weights`.

    Returns:
        This rank's part of the summed LM losses, on the device.
    """
    languages = len(original_table) - 1
    forward = partial(
        _forward_step,
        weights=step_weights(batches, original_table),
        original_table=original_table,
        has_routers=config.num_moe_experts is not None,
    )
    interleaved = len(chunks) > 1
    iterators = [iter(batches) for _ in chunks]
    batch, sequence = batches[0]["tokens"].shape
    reports = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iterators if interleaved else iterators[0],
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=len(batches),
        seq_length=sequence,
        micro_batch_size=batch,
        forward_only=forward_only,
    )
    return _sum_of_rank(reports, languages, batches[0]["tokens"].device)


def _forward_step(
    iterator: Iterator[Batch],
    model: torch.nn.Module,
    *,
    weights: StepWeights,
    original_table: torch.Tensor,
    has_routers: bool,
) -> tuple:
    """Megatron's forward_step_func: output of a stage, and the function that makes a loss of it on the last one."""
    batch = next(iterator)
    advance()
    tags = None
    if has_routers:
        language = batch["language"]
        groups = _groups(original_table)[language]
        tags = token_tags(groups >= 0, language >= 0, weights.lpr, weights.micro_batch, groups)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], padding_mask=tags)
    return output, partial(_loss, batch, len(original_table) - 1)


def _groups(table: torch.Tensor) -> torch.Tensor:
    """The group of each language that has a prior, else -1; a table of original languages says the same in bools."""
    return torch.where(table, 0, -1) if table.dtype == torch.bool else table


def _loss(batch: Batch, languages: int, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed loss, number of tokens and the report by language of one micro-batch.

    Args:
        output: LM loss of each token, [batch, sequence].
    """
    mask = batch["loss_mask"]
    losses = output.float() * mask
    tokens = mask.sum()
    report = torch.zeros(3, languages, dtype=torch.float64, device=output.device)
    language = batch["language"].clamp(min=0).flatten()  # padding has no loss: its zeros may go anywhere
    report[0].index_add_(0, language, losses.detach().double().flatten())
    report[1].index_add_(0, language, mask.double().flatten())
    text = torch.where(batch["language"] >= 0, output.detach(), 0.0)
    report[2].index_add_(0, language, text.double().flatten())
    return losses.sum(), tokens.to(torch.int), report


def _sum_of_rank(reports: list[torch.Tensor], languages: int, device: torch.device) -> LossSums:
    """The last stage has the reports, equal on its TP ranks: one of these counts for all."""
    total = torch.zeros(3, languages, dtype=torch.float64, device=device)
    if reports and parallel_state.get_tensor_model_parallel_rank() == 0:
        total += torch.stack(reports).sum(dim=0)
    return LossSums(*total)
