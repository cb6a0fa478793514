"""From flags to a run that is ready to step: everything checked, built and, where there is a checkpoint, resumed."""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich.console import Console
from rich.table import Table

from megatron_moe_lpr.checkpoint.format.card import Base, CheckpointCard
from megatron_moe_lpr.checkpoint.format.directory import CheckpointDirectory
from megatron_moe_lpr.checkpoint.format.trainable_only import open_reader
from megatron_moe_lpr.checkpoint.loading.model import LoadedModel, load_model, model_shape
from megatron_moe_lpr.checkpoint.saving.frozen_weights import frozen_weights
from megatron_moe_lpr.data.language_groups import groups_with_prior, original_languages
from megatron_moe_lpr.data.reading.config import DataSources, read_data_sources, with_original
from megatron_moe_lpr.data.reading.datasets import Datasets, build_datasets
from megatron_moe_lpr.data.reading.vocabulary import check_token_ids
from megatron_moe_lpr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.config import (
    ComputeOptions,
    ModelShape,
    check_layout,
    check_options,
    check_platform,
)
from megatron_moe_lpr.model.configuration.dtype import choose_dtype, say_dtype
from megatron_moe_lpr.model.configuration.fp8 import FP8Options
from megatron_moe_lpr.model.parameter_kinds import KINDS, kind_of
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.platform import Platform, select_platform
from megatron_moe_lpr.training.checkpointing import RunState, load_run
from megatron_moe_lpr.training.configuration.config import TrainingConfig
from megatron_moe_lpr.training.configuration.description import accepted_names, describe_run, recorded_schedule
from megatron_moe_lpr.training.configuration.stages import Stage, check_stage, freeze
from megatron_moe_lpr.training.optimizer import build_optimizer, build_schedule, wrap_data_parallel
from megatron_moe_lpr.training.run_directory.resuming import OwnCheckpoint, find_own_checkpoint
from megatron_moe_lpr.training.run_directory.run_start import open_start, opened, opening_steps, start_of
from megatron_moe_lpr.training.run_directory.start_marker import check_same_directory


@dataclasses.dataclass
class Run:
    """A run that is ready to step."""

    config: TrainingConfig
    stage: Stage
    platform: Platform
    model: LoadedModel
    sources: DataSources
    datasets: Datasets
    state: RunState
    num_microbatches: int
    description: dict[str, Any]
    """What the run is, see `description.describe_run`."""
    own: OwnCheckpoint | None = None
    """Where it goes on from; None: it has just begun."""

    @property
    def original_table(self) -> torch.Tensor:
        """Int [languages + 1] on the model's device: the group of each language that has a prior, else -1."""
        original, groups = self.sources.original_languages, self.model.shape.num_groups
        known = groups_with_prior(self.model.card.history, original, groups)
        return self.sources.languages.group_table(known).to(self.platform.device)

    def openness(self, iteration: int) -> float:
        """Weight of the latest expansion's experts in the routers during the step that ends at `iteration`."""
        steps = opening_steps(self.config.stage.open_experts_iters, self.lengths)
        return opened(self.model.card.openness, iteration, steps)

    @property
    def lengths(self) -> list[int]:
        """Steps of the run as planned at first, after it was lengthened once, and so on."""
        return self.own.lengths if self.own else [self.config.batch.train_iters]


def prepare(config: TrainingConfig) -> Run:
    """Check everything that can be checked without building, then build.

    Raises:
        UserError: a flag, checkpoint, dataset or layout that does not fit.
    """
    stage = config.stage.resolve()
    accepted_names(config.checkpoint.accept_changes, config.checkpoint.override_opt_param_scheduler)
    start, card = open_start(config.checkpoint, stage.name)
    shape = model_shape(start)
    tokenizer = load_tokenizer(start.side_directory) if card.tokenizer_files else None
    fingerprint = tokenizer.fingerprint if tokenizer else None
    sources = read_data_sources(config.data, fingerprint, original_languages(card.history))
    check_token_ids([*sources.train, *sources.valid], shape.architecture.vocab_size, str(start.path))
    earlier = groups_with_prior(card.history, sources.original_languages, shape.num_groups)[1:]
    check_stage(stage, card.is_moe, sources, earlier, bool(card.inserted_blocks))
    _check_expansion(config, stage, card)
    _check_lengths(config, shape)
    if config.checkpoint.save_trainable_only and stage.name == "full":
        raise UserError("--save-trainable-only: with --stage full every weight trains; leave it out")
    config.checkpoint.retention.check(config.checkpoint.save_interval)
    check_layout(shape, config.layout)
    platform = select_platform(config.platform, config.layout.tensor_model_parallel_size)
    asked = config.precision.asked_dtype()
    dtype = choose_dtype(asked, card.compute_dtype, platform)
    options = config.precision.compute_options(dtype, config.fp8)
    check_options(shape, config.layout, options, config.batch.micro_batch_size * config.batch.seq_length)
    check_parameter_gather(config.fp8, stage)
    check_platform(shape, config.layout, options, platform)
    config = dataclasses.replace(config, optimizer=config.optimizer.on(platform))
    if config.fp8.fp8_param_gather and not config.optimizer.use_distributed_optimizer:
        raise UserError("--fp8-param-gather needs --use-distributed-optimizer")
    initialize_parallel(platform, config.layout, config.data.seed, config.distributed_timeout_minutes)
    say_dtype(asked, card.compute_dtype, card.dtype, platform)
    num_microbatches = _num_microbatches(config)
    check_same_directory(config.checkpoint.save)
    description = describe_run(config, stage, sources, options.dtype)
    own = find_own_checkpoint(config.checkpoint, description, card)
    if own:
        start, card = start_of(own, start, card, config.checkpoint.save)
        # Also where the flag is not given again: the run's checkpoints and its validation go on knowing them.
        sources = with_original(sources, config.data, original_languages([*card.history, own.recorded]))
        description = describe_run(config, stage, sources, options.dtype)
    sources = dataclasses.replace(sources, notes=(*sources.notes, *_end_of_document(sources, tokenizer)))
    if own and config.checkpoint.use_checkpoint_opt_param_scheduler:
        config = dataclasses.replace(config, optimizer=recorded_schedule(own.recorded, config))
        description = describe_run(config, stage, sources, options.dtype)
    lengths = own.lengths if own else [config.batch.train_iters]
    samples = [steps * config.batch.global_batch_size for steps in lengths]
    valid_samples = config.logging.valid_samples(config.batch.global_batch_size)
    datasets = build_datasets(sources, config.data, config.batch.seq_length, samples, valid_samples)
    model, state = _build(config, stage, platform, options, start, own)
    model = dataclasses.replace(model, card=card)
    return Run(config, stage, platform, model, sources, datasets, state, num_microbatches, description, own)


def _build(
    config: TrainingConfig,
    stage: Stage,
    platform: Platform,
    options: ComputeOptions,
    start: CheckpointDirectory,
    own: OwnCheckpoint | None,
) -> tuple[LoadedModel, RunState]:
    model = load_model(
        start,
        config.layout,
        platform,
        options,
        **stage.coefficients,
        lpr_loss_form=config.stage.lpr_loss_form,
        calculate_per_token_loss=True,
        # Where the run goes on from its own complete checkpoint, nothing of these tensors is left, and that one is
        # verified.
        verified=config.checkpoint.verify and (own is None or own.card.base is not None),
    )
    freeze(model.chunks, stage, model.shape.inserted_blocks)
    # Megatron's plain bf16 optimizer cannot save what is fp32 beside bf16, as the routers are.
    distributed = config.optimizer.use_distributed_optimizer or model.config.bf16
    optimizer_options = dataclasses.replace(config.optimizer, use_distributed_optimizer=distributed)
    chunks = wrap_data_parallel(model.chunks, model.config, optimizer_options)
    optimizer = build_optimizer(chunks, model.config, optimizer_options, platform)
    state = RunState(chunks, optimizer, build_schedule(optimizer, optimizer_options, config.batch))
    if own:
        load_run(state, own.directory, start)
    if not config.checkpoint.save_trainable_only:
        # In a run that goes on these are its own checkpoint's: what --load means may have moved since.
        complete = own is not None and own.directory.card().base is None
        state.frozen = frozen_weights(own.directory if own and complete else start, options.dtype)
    return dataclasses.replace(model, chunks=chunks), state


def check_parameter_gather(options: FP8Options, stage: Stage) -> None:
    """Weights that are frozen must stay as they are, to the bit: FP8 would round them.

    Raises:
        UserError: the new experts don't train.
    """
    if options.fp8_param_gather and "new experts" not in stage.trains:
        raise UserError(
            f"--fp8-param-gather: stage {stage.name} keeps the new experts frozen, to the bit; leave it out"
        )


def _end_of_document(sources: DataSources, tokenizer: Tokenizer | None) -> list[str]:
    """Whether the data's documents end as the model's texts do."""
    try:
        if tokenizer is None or tokenizer.eod == sources.eod:
            return []
    except UserError:  # The tokenizer names no such token.
        return []
    ours, theirs = (f"{tokenizer.token(number)!r} ({number})" for number in (sources.eod, tokenizer.eod))
    return [
        f"--data-path: documents end with {ours}, the texts of the model with {theirs}; if you did not choose the "
        "former by --eod-token, preprocess again"
    ]


def _check_expansion(config: TrainingConfig, stage: Stage, card: CheckpointCard) -> None:
    """Raises UserError where the run would leave the latest experts half in use, or round frozen ones."""
    steps, flag = config.stage.open_experts_iters, "--open-experts-iters"
    if card.openness == 1 and steps is not None:
        raise UserError(f"{flag}: the experts of --load are all in use; leave it out")
    if card.openness < 1 and "new experts" not in stage.trains:
        raise UserError(
            "--load: the experts of its latest expansion are not trained in; run --stage 1 to its end first"
        )
    if steps is not None and not 1 <= steps <= config.batch.train_iters:
        raise UserError(f"{flag} {steps}: from 1 to --train-iters {config.batch.train_iters}")
    if card.expansions and config.fp8.fp8_param_gather:
        raise UserError("--fp8-param-gather: would round the frozen experts of earlier expansions; leave it out")


def _num_microbatches(config: TrainingConfig) -> int:
    count = config.batch.num_microbatches(config.layout.data_parallel_size(dist.get_world_size()))
    stages = config.layout.pipeline_model_parallel_size
    if config.layout.num_virtual_stages_per_pipeline_rank > 1 and count % stages:
        raise UserError(
            f"--num-virtual-stages-per-pipeline-rank needs the {count} micro-batches of a step to be a multiple of "
            f"--pipeline-model-parallel-size {stages}; change --global-batch-size or --micro-batch-size"
        )
    return count


def _check_lengths(config: TrainingConfig, shape: ModelShape) -> None:
    longest = shape.architecture.max_position_embeddings
    if config.batch.seq_length > longest:
        raise UserError(f"--seq-length {config.batch.seq_length}: the model has only {longest} positions")
    config.layout.check_sequence(config.batch.seq_length)
    for name in ("train_iters", "micro_batch_size", "global_batch_size", "seq_length"):
        if getattr(config.batch, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config.batch, name)}: must be at least 1")


def history_entry(run: Run) -> dict[str, Any]:
    """What the checkpoint will say of this run."""
    return {
        **run.description,
        **({"train_lengths": run.lengths} if len(run.lengths) > 1 else {}),
        **({"changes": run.own.changes} if run.own and run.own.changes else {}),
        "iterations": run.state.iteration,
        "tokens": run.state.consumed_tokens,
    }


def card_of(run: Run, base: Base | None = None) -> CheckpointCard:
    """The card of a checkpoint of this run: the starting one's, one stage further.

    Args:
        base: where the weights are that the checkpoint does not hold; None: it holds all.
    """
    start = run.model.card
    # What is frozen keeps the dense model's dtype.
    trains_all = run.stage.trains >= set(KINDS)
    dtype = str(run.model.config.params_dtype).removeprefix("torch.") if trains_all else start.dtype
    history, openness = [*start.history, history_entry(run)], run.openness(run.state.iteration)
    return dataclasses.replace(start, dtype=dtype, history=history, openness=openness, base=base)


def print_overview(run: Run) -> None:
    """On rank 0: what trains and what is frozen, and what the data holds."""
    if dist.get_rank() != 0:
        return
    for note in run.sources.notes:
        print(f"note: {note}", flush=True)
    console = Console()
    console.print(_parameter_table(run))
    console.print(_data_table(run))


def _parameter_table(run: Run) -> Table:
    counts = dict.fromkeys(KINDS, 0)
    for key, info in open_reader(run.model.directory).tensors.items():
        if key.startswith(("embedding.", "decoder.", "output_layer.")):
            counts[kind_of(key, run.model.shape.inserted_blocks)] += torch.Size(info.shape).numel()
    layout = run.config.layout
    title = (
        f"Stage {run.stage.name}: {run.stage.title} on {run.platform.name}, TP {layout.tensor_model_parallel_size} "
        f"PP {layout.pipeline_model_parallel_size} EP {layout.expert_model_parallel_size} "
        f"DP {parallel_state.get_data_parallel_world_size()}"
    )
    table = Table("parameters", "count", "", title=title, title_justify="left")
    for kind, count in counts.items():
        if count:
            trains = kind in run.stage.trains
            table.add_row(kind, f"{count:,}", "[green]trains[/green]" if trains else "frozen")
    trainable = sum(count for kind, count in counts.items() if kind in run.stage.trains)
    table.add_row("all", f"{sum(counts.values()):,}", f"{trainable:,} train", style="bold")
    return table


def _data_table(run: Run) -> Table:
    batch = run.config.batch
    tokens = batch.train_iters * batch.global_batch_size * batch.seq_length
    table = Table("language", "", "share", "tokens to draw", "epochs", title="Training data", title_justify="left")
    for one in run.sources.tokens_by_language(tokens):
        kind = "original" if one.is_original else "expanded"
        numbers = (f"{one.fraction:.2%}", f"{one.tokens_drawn:,.0f}", f"{one.epochs:.2f}")
        table.add_row(one.language, kind, *numbers)
    return table
