"""Runs micro-batches through Megatron's schedule; losses are normalised over the global batch."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_moe_lpr.data.reading.batches import Batch
from megatron_moe_lpr.data.reading.documents import BOUNDARIES
from megatron_moe_lpr.liveness import advance, waiting_for
from megatron_moe_lpr.model.build import unwrap
from megatron_moe_lpr.model.configuration.config import MoELPRConfig
from megatron_moe_lpr.model.moe.token_tags import token_tags
from megatron_moe_lpr.parallel.context import own_tokens


@dataclasses.dataclass(frozen=True)
class StepWeights:
    """Weight of one token in the router's losses and the new-token loss, so that their sum over the step is a mean over
    the global batch.

    Megatron divides every gradient by the number of tokens with a loss (`calculate_per_token_loss`), so the weights
    have that number as a factor.
    """

    lpr: torch.Tensor
    """Tokens with a loss / tokens of languages that have a prior; 0 where there is none."""
    micro_batch: torch.Tensor
    """Tokens with a loss / micro-batches of the step."""


@dataclasses.dataclass(frozen=True)
class LossSums:
    """Summed LM loss in nats and number of tokens by language, of one rank or, after `reduced`, of all ranks."""

    loss: torch.Tensor
    """[languages], fp64: summed loss of the tokens with that language's tag."""
    tokens: torch.Tensor
    """[languages], fp64."""
    text_loss: torch.Tensor | None = None
    """[languages], fp64: like `loss`, but over all tokens of the text, also those with a loss mask of 0; None: not
    summed."""
    new_token_mass: torch.Tensor | None = None
    """[languages], fp64: summed probability that new tokens took (`import --tokenizer`), over the tokens that `tokens`
    counts; None: in training, and of a model without new tokens. Never without `text_loss`."""

    @property
    def mean(self) -> float:
        """LM loss per token over all languages, in nats."""
        return (self.loss.sum() / self.tokens.sum()).item()

    def language_loss(self, language: int) -> float:
        """LM loss per token of one language, in nats; NaN where there was no token of it."""
        return (self.loss[language] / self.tokens[language]).item()

    def by_language(self, names: Sequence[str]) -> dict[str, float]:
        """LM loss per token, in nats, of each language that has a token, by its name."""
        return {name: self.language_loss(index) for index, name in enumerate(names) if self.tokens[index] > 0}

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums(*(mine + theirs for mine, theirs in zip(self.parts, other.parts, strict=False)))

    @property
    def parts(self) -> list[torch.Tensor]:
        """What was summed, in the order of the fields."""
        fields = (self.loss, self.tokens, self.text_loss, self.new_token_mass)
        return [part for part in fields if part is not None]

    def reduced_unless_stopped(self, stops: bool) -> "LossSums | None":
        """Sum over all ranks like `reduced`, in the same exchange as a flag. Every rank must call it.

        Args:
            stops: whether this rank wants all ranks to stop.

        Returns:
            None on every rank where any rank wants to stop.
        """
        parts = self.parts
        flag = torch.full((1,), float(stops), dtype=self.loss.dtype, device=self.loss.device)
        total = torch.cat((*parts, flag))
        with waiting_for("the losses of all ranks", on_peers=True):
            dist.all_reduce(total)
            *sums, stopping = total.cpu().split((*map(len, parts), 1))
        return None if stopping.item() else LossSums(*sums)

    def reduced(self) -> "LossSums":
        """Sum over all ranks; the host waits for the device and has the result. Every rank must call it."""
        total = torch.stack(self.parts)
        with waiting_for("the losses of all ranks", on_peers=True):
            dist.all_reduce(total)
            return LossSums(*total.cpu())


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to the model's device; the host does not wait."""
    return {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}


def step_weights(batches: Sequence[Batch], language_group: torch.Tensor) -> StepWeights:
    """Count the tokens of the global batch, over micro-batches and data-parallel ranks, for the weights of its tokens.

    Args:
        batches: this rank's micro-batches.
        language_group: int64 [languages + 1], on the model's device: for each language that has a prior its group (0
            for original languages), else -1; the last entry is padding's (`LanguageRegistry.group_table`).
    """
    device = batches[0]["tokens"].device
    with_loss = torch.stack([batch["loss_mask"].sum() for batch in batches]).sum()
    has_prior = language_group >= 0
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
    language_group: torch.Tensor,
    forward_only: bool = False,
) -> LossSums:
    """Like `run_micro_batches`, with the losses summed over all ranks, on the host, which waits for the device."""
    return run_micro_batches(chunks, config, batches, language_group, forward_only).reduced()


def run_micro_batches(
    chunks: Sequence[torch.nn.Module],
    config: MoELPRConfig,
    batches: Sequence[Batch],
    language_group: torch.Tensor,
    forward_only: bool = False,
) -> LossSums:
    """Forward and, unless `forward_only`, backward of all micro-batches. Every rank must call it.

    This rank's part of the losses stays on the device, so that the host need not wait for it.

    Args:
        chunks: this rank's part of the model, several chunks with an interleaved pipeline schedule.
        batches: this rank's micro-batches on the model's device, [batch, sequence] each.
        language_group: see `step_weights`.

    Returns:
        This rank's part of the summed LM losses.
    """
    languages = len(language_group) - 1
    forward = partial(
        _forward_step,
        weights=step_weights(batches, language_group),
        language_group=language_group,
        has_tags=config.num_moe_experts is not None or config.new_token_loss_coeff > 0,
    )
    interleaved = len(chunks) > 1
    iterators = [iter(batches) for _ in chunks]
    batch, sequence = batches[0]["tokens"].shape
    # Where documents are kept apart, the layers compute one sequence of all the micro-batch's tokens (`MoELPRModel`).
    shape = (1, batch * sequence) if BOUNDARIES in batches[0] else (batch, sequence)
    reports = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iterators if interleaved else iterators[0],
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=len(batches),
        seq_length=shape[1],
        micro_batch_size=shape[0],
        forward_only=forward_only,
    )
    rows = 4 if unwrap(chunks[0]).vocabulary.is_extended and not torch.is_grad_enabled() else 3
    total = torch.zeros(rows, languages, dtype=torch.float64, device=batches[0]["tokens"].device)
    return _rank_sums(reports, total)


def _forward_step(
    iterator: Iterator[Batch],
    model: torch.nn.Module,
    *,
    weights: StepWeights,
    language_group: torch.Tensor,
    has_tags: bool,
) -> tuple:
    """Megatron's forward_step_func.

    Returns:
        The output of this pipeline rank, and the function that computes the loss from it on the last pipeline rank.
    """
    batch = next(iterator)
    advance()
    tags = None
    if has_tags:
        language = batch["language"]
        groups = language_group[language]
        # Of whole sequences: a tag holds a share in the tokens of the micro-batch.
        tags = token_tags(groups >= 0, language >= 0, weights.lpr, weights.micro_batch, groups)
    context = parallel_state.get_context_parallel_group()
    batch = {key: tensor if key == BOUNDARIES else own_tokens(tensor, 1, context) for key, tensor in batch.items()}
    tags = None if tags is None else own_tokens(tags, 1, context)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        padding_mask=tags,
        cu_seqlens=batch.get(BOUNDARIES),
    )
    mass = None if torch.is_grad_enabled() else unwrap(model).new_token_mass
    return output, partial(_loss, batch, len(language_group) - 1, mass)


def _loss(
    batch: Batch, languages: int, mass: torch.Tensor | None, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed loss and number of tokens of one micro-batch, and the sums by language that `LossSums` has.

    Args:
        mass: probability of all new tokens in each token's prediction, [batch, sequence]; None: not measured.
        output: LM loss of each token in nats, [batch, sequence].
    """
    mask = batch["loss_mask"]
    losses = output.float() * mask
    tokens = mask.sum()
    report = torch.zeros(3 if mass is None else 4, languages, dtype=torch.float64, device=output.device)
    language = batch["language"].clamp(min=0).flatten()  # padding has no loss: its zeros may go anywhere
    report[0].index_add_(0, language, losses.detach().double().flatten())
    report[1].index_add_(0, language, mask.double().flatten())
    text = torch.where(batch["language"] >= 0, output.detach(), 0.0)
    report[2].index_add_(0, language, text.double().flatten())
    if mass is not None:
        report[3].index_add_(0, language, torch.where(mask > 0, mass, 0.0).double().flatten())
    return losses.sum(), tokens.to(torch.int), report


def _rank_sums(reports: list[torch.Tensor], total: torch.Tensor) -> LossSums:
    """Add the reports of the last pipeline rank to `total`; equal on all its TP ranks, so that only one of these
    counts."""
    if reports and parallel_state.get_tensor_model_parallel_rank() == 0:
        total += torch.stack(reports).sum(dim=0)
    return LossSums(*total)
