"""Build a run from its flags: checks, model, data, optimizer, and the checkpoint to resume from."""

import dataclasses
import os
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard, ParentCheckpoint
from megatron_moe_lpr.checkpoint.format.directory import CheckpointDirectory
from megatron_moe_lpr.checkpoint.loading.model import LoadedModel, load_model, model_shape
from megatron_moe_lpr.checkpoint.saving.frozen_weights import frozen_weights
from megatron_moe_lpr.data.chat_template import template_note
from megatron_moe_lpr.data.language_groups import groups_with_prior, original_languages
from megatron_moe_lpr.data.reading.config import DataSources, read_data_sources, with_original
from megatron_moe_lpr.data.reading.datasets import Datasets, build_datasets
from megatron_moe_lpr.data.reading.vocabulary import check_token_ids
from megatron_moe_lpr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_moe_lpr.engine.optimizer import build_optimizer, build_schedule, wrap_data_parallel
from megatron_moe_lpr.engine.state_options import check_optimizer_states
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.config import ModelShape, check_layout, check_options, check_platform
from megatron_moe_lpr.model.configuration.context import check_documents_apart
from megatron_moe_lpr.model.configuration.dtype import choose_dtype, report_dtype
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.platform import Platform, select_platform
from megatron_moe_lpr.platform.determinism import fix_order_of_sums
from megatron_moe_lpr.training.checkpointing import RunState, load_run
from megatron_moe_lpr.training.configuration.config import TrainingConfig
from megatron_moe_lpr.training.configuration.description import accepted_names, describe_run, recorded_schedule
from megatron_moe_lpr.training.configuration.model_checks import check_fp8_param_gather, check_sequence_length
from megatron_moe_lpr.training.configuration.rank_counts import micro_batches_on
from megatron_moe_lpr.training.configuration.stages import Stage, check_stage, freeze, stage_note
from megatron_moe_lpr.training.run_directory.resuming import ResumePoint, find_resume_point
from megatron_moe_lpr.training.run_directory.run_start import (
    find_start,
    newest_weight_at,
    open_experts_steps,
    open_start,
)
from megatron_moe_lpr.training.run_directory.start_marker import check_same_directory


@dataclasses.dataclass
class Run:
    """A run that is ready for its next step."""

    config: TrainingConfig
    stage: Stage
    platform: Platform
    model: LoadedModel
    sources: DataSources
    datasets: Datasets
    state: RunState
    num_microbatches: int
    description: dict[str, Any]
    """All that decides the run's numbers, see `description.describe_run`."""
    resume_from: ResumePoint | None = None
    """The run's own checkpoint that it resumes from; None: the run starts."""

    @property
    def language_group(self) -> torch.Tensor:
        """Group of each language, as `engine.micro_batches.step_weights` takes it."""
        original, groups = self.sources.original_languages, self.model.shape.num_groups
        known = groups_with_prior(self.model.card.history, original, groups)
        return self.sources.languages.group_table(known).to(self.platform.device)

    def newest_weight(self, iteration: int) -> float:
        """Weight of the latest expansion's experts in the routers during the step that ends at `iteration`, 0 to 1."""
        steps = open_experts_steps(self.config.stage.open_experts_iters, self.lengths)
        return newest_weight_at(self.model.card.openness, iteration, steps)

    @property
    def lengths(self) -> list[int]:
        """Steps of the run as first planned, after it was lengthened once, and so on."""
        return self.resume_from.lengths if self.resume_from else [self.config.batch.train_iters]


def prepare(config: TrainingConfig) -> Run:
    """Check everything that can be checked without building the model, then build it. Every rank must call it.

    Raises:
        UserError: a flag, checkpoint, dataset or layout that does not fit.
    """
    stage = config.stage.resolve()
    accepted_names(config.checkpoint.accept_changes, config.checkpoint.override_opt_param_scheduler)
    start, card = open_start(config.checkpoint, stage.name)
    shape = model_shape(start)
    if not shape.has_new_rows:
        stage = dataclasses.replace(stage, new_token_loss_coeff=0.0)
    tokenizer = load_tokenizer(start.side_directory) if card.tokenizer_files else None
    fingerprint = tokenizer.fingerprint if tokenizer else None
    sources = read_data_sources(config.data, fingerprint, original_languages(card.history), card.earlier_tokenizers)
    _check_run(config, stage, start, card, sources)
    platform, options = _choose_platform(config, stage, shape, card)
    check_documents_apart(config.layout, platform, _keeps_documents_apart(config, sources))
    config = dataclasses.replace(config, optimizer=config.optimizer.with_platform_defaults(platform))

    # From here on ranks exchange: every check that one rank can make alone has passed.
    initialize_parallel(platform, config.layout, config.data.seed, config.distributed_timeout_minutes)
    report_dtype(config.compute.requested_dtype(), card.compute_dtype, card.dtype, platform)
    num_microbatches = micro_batches_on(config, dist.get_world_size())
    check_same_directory(config.checkpoint.save)
    described = describe_run(config, stage, sources, options.dtype, shape.has_new_rows)
    resume_from = find_resume_point(config.checkpoint, described, card)
    if resume_from:
        start, card = find_start(resume_from, start, card, config.checkpoint.save)
        # Original languages that --original-languages named at the start stay so where the flag is not given again.
        sources = with_original(sources, config.data, original_languages([*card.history, resume_from.recorded]))
        if config.checkpoint.use_checkpoint_opt_param_scheduler:
            config = dataclasses.replace(config, optimizer=recorded_schedule(resume_from.recorded, config))
    description = describe_run(config, stage, sources, options.dtype, shape.has_new_rows)
    other_template = template_note({entry.prefix: entry.manifest for entry in sources.train}, start.side_directory)
    optional = filter(None, [other_template, stage_note(stage, sources)])
    notes = (*sources.notes, *_end_of_document(sources, tokenizer), *optional)
    sources = dataclasses.replace(sources, notes=notes)
    datasets = _build_datasets(config, sources, resume_from)
    model, state = _build_model(config, stage, platform, options, start, resume_from)
    model = dataclasses.replace(model, card=card)
    return Run(config, stage, platform, model, sources, datasets, state, num_microbatches, description, resume_from)


def _check_run(
    config: TrainingConfig, stage: Stage, start: CheckpointDirectory, card: CheckpointCard, sources: DataSources
) -> None:
    """Check flags, data and the checkpoint against each other, without a device."""
    shape = model_shape(start)
    check_token_ids([*sources.train, *sources.valid], shape.total_vocab_size, str(start.path))
    earlier = groups_with_prior(card.history, sources.original_languages, shape.num_groups)[1:]
    check_stage(stage, card.is_moe, sources, earlier, bool(card.inserted_blocks))
    _check_expansion(config, stage, card)
    _check_lengths(config, shape)
    if config.checkpoint.save_trainable_only and stage.name == "full":
        raise UserError("--save-trainable-only: with --stage full every weight trains; leave it out")
    config.checkpoint.retention.check(config.checkpoint.save_interval)
    check_layout(shape, config.layout)


def _choose_platform(
    config: TrainingConfig, stage: Stage, shape: ModelShape, card: CheckpointCard
) -> tuple[Platform, ComputeOptions]:
    """Select the platform and the dtype to compute in, and check that the model can be computed so."""
    platform = select_platform(
        config.platform, config.layout.tensor_model_parallel_size, config.compute.transformer_impl
    )
    if config.compute.deterministic_mode and platform.on_gpus:
        fix_order_of_sums(os.environ)
    options = config.compute.with_dtype(choose_dtype(config.compute.requested_dtype(), card.compute_dtype, platform))
    check_options(shape, config.layout, options, config.batch.micro_batch_size * config.batch.seq_length)
    check_fp8_param_gather(options.fp8, stage, bool(card.expansions), config.optimizer.with_platform_defaults(platform))
    check_platform(shape, config.layout, options, platform)
    check_optimizer_states(config.optimizer.states, options.dtype, platform)
    return platform, options


def _keeps_documents_apart(config: TrainingConfig, sources: DataSources) -> bool:
    """Whether documents of a sample do not see each other, in training or in validation."""
    packed = {sources.is_packed, *(entry.is_packed for entry in sources.valid)}
    return any(config.data.documents.apart(one).reset_attention_mask for one in packed)


def _build_datasets(config: TrainingConfig, sources: DataSources, resume_from: ResumePoint | None) -> Datasets:
    lengths = resume_from.lengths if resume_from else [config.batch.train_iters]
    samples = [steps * config.batch.global_batch_size for steps in lengths]
    valid_samples = config.logging.valid_samples(config.batch.global_batch_size)
    return build_datasets(sources, config.data, config.batch.seq_length, samples, valid_samples)


def _build_model(
    config: TrainingConfig,
    stage: Stage,
    platform: Platform,
    options: ComputeOptions,
    start: CheckpointDirectory,
    resume_from: ResumePoint | None,
) -> tuple[LoadedModel, RunState]:
    """Load the model, freeze what the stage does not train, build the optimizer, and load the state to resume from."""
    # A complete checkpoint to resume from, which is verified, replaces all tensors that are loaded here.
    resumes_whole = resume_from is not None and resume_from.card.parent is None
    model = load_model(
        start,
        config.layout,
        platform,
        options,
        **stage.coefficients,
        lpr_loss_form=config.stage.lpr_loss_form,
        calculate_per_token_loss=True,
        verified=config.checkpoint.verify and not resumes_whole,
    )
    freeze(model.chunks, stage, model.shape.inserted_blocks, len(model.shape.new_tokens))
    # Megatron's plain bf16 optimizer cannot save what is fp32 beside bf16, as the routers are.
    distributed = config.optimizer.use_distributed_optimizer or model.config.bf16
    optimizer_options = dataclasses.replace(config.optimizer, use_distributed_optimizer=distributed)
    chunks = wrap_data_parallel(model.chunks, model.config, optimizer_options)
    optimizer = build_optimizer(chunks, model.config, optimizer_options, platform)
    state = RunState(chunks, optimizer, build_schedule(optimizer, optimizer_options, config.batch))
    if resume_from:
        load_run(state, resume_from.directory, start)
    if not config.checkpoint.save_trainable_only:
        # A resumed run copies them from its own checkpoint: what --load names may have moved since.
        source = resume_from.directory if resume_from and resumes_whole else start
        state.frozen = frozen_weights(source, options.dtype)
    return dataclasses.replace(model, chunks=chunks), state


def _end_of_document(sources: DataSources, tokenizer: Tokenizer | None) -> list[str]:
    """A note where the data's documents end with another token than the model's texts."""
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
    """Raise UserError where the run would leave the latest expansion's experts half in use."""
    steps, flag = config.stage.open_experts_iters, "--open-experts-iters"
    if card.openness == 1 and steps is not None:
        raise UserError(f"{flag}: the experts of --load are all in use; leave it out")
    if card.openness < 1 and "new experts" not in stage.trains:
        raise UserError(
            "--load: the experts of its latest expansion are not trained in; run --stage 1 to its end first"
        )
    if steps is not None and not 1 <= steps <= config.batch.train_iters:
        raise UserError(f"{flag} {steps}: from 1 to --train-iters {config.batch.train_iters}")
    if config.stage.train_base_router and not card.has_mixture_base:
        raise UserError("--train-base-router: the base model of --load is dense, all router rows train; leave it out")


def _check_lengths(config: TrainingConfig, shape: ModelShape) -> None:
    check_sequence_length(config.batch.seq_length, shape.architecture)
    config.layout.check_sequence(config.batch.seq_length)
    for name in ("train_iters", "micro_batch_size", "global_batch_size", "seq_length"):
        if getattr(config.batch, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config.batch, name)}: must be at least 1")


def history_entry(run: Run) -> dict[str, Any]:
    """The run as an entry of the history in a checkpoint's card."""
    return {
        **run.description,
        **({"train_lengths": run.lengths} if len(run.lengths) > 1 else {}),
        **({"changes": run.resume_from.changes} if run.resume_from and run.resume_from.changes else {}),
        "iterations": run.state.iteration,
        "tokens": run.state.consumed_tokens,
    }


def checkpoint_card(run: Run, parent: ParentCheckpoint | None = None) -> CheckpointCard:
    """The card of a checkpoint of this run's current step: that of the checkpoint it started from, with this run added.

    Args:
        parent: checkpoint that holds the weights that this one leaves out; None: it holds all.
    """
    start = run.model.card
    # Frozen weights keep the dense model's dtype.
    trains_all = run.stage.trains >= set(ParameterKind)
    dtype = str(run.model.config.params_dtype).removeprefix("torch.") if trains_all else start.dtype
    history, openness = [*start.history, history_entry(run)], run.newest_weight(run.state.iteration)
    return dataclasses.replace(start, dtype=dtype, history=history, openness=openness, parent=parent)
