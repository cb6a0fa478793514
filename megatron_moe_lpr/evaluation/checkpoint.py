"""Evaluate a checkpoint: from flags to one result for each validation dataset."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard
from megatron_moe_lpr.checkpoint.format.directory import CheckpointDirectory
from megatron_moe_lpr.checkpoint.format.trainable_only import kept_for_reading
from megatron_moe_lpr.checkpoint.loading.model import load_model, model_shape
from megatron_moe_lpr.checkpoint.loading.verification import open_checkpoint
from megatron_moe_lpr.data.language_groups import groups_with_prior, original_languages, trained_languages
from megatron_moe_lpr.data.language_names import covered, language_title
from megatron_moe_lpr.data.original_languages import read_original_languages
from megatron_moe_lpr.data.reading.blend import BlendEntry, read_blend
from megatron_moe_lpr.data.reading.languages import LanguageRegistry
from megatron_moe_lpr.data.reading.validation_dataset import ValidationDataset
from megatron_moe_lpr.data.reading.vocabulary import check_token_ids
from megatron_moe_lpr.data.tokenizer import load_tokenizer
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.finite import check_finite_losses, check_finite_weights
from megatron_moe_lpr.evaluation.losses import DatasetLoss, evaluate_dataset
from megatron_moe_lpr.liveness import long_work
from megatron_moe_lpr.model.configuration.config import ComputeOptions, ModelShape, check_layout
from megatron_moe_lpr.model.configuration.dtype import choose_dtype, say_dtype
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout, check_timeout
from megatron_moe_lpr.platform import PlatformName, select_platform


@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """What to evaluate, on what, and how."""

    load: Path
    valid_data_path: list[str]
    original_languages: list[str]
    """Beside those that the checkpoint's history knows."""
    seq_length: int
    micro_batch_size: int
    dtype: torch.dtype | None
    """What to compute in; None: see `CheckpointCard.compute_dtype`, and fp32 on CPUs without bf16 instructions."""
    layout: ParallelLayout
    platform: PlatformName
    base_checkpoint: Path | None = None
    """Where the weights are that `load` does not hold; None: where it says, or it holds all."""
    verify: bool = True
    """Compare the checkpoint's files with their checksums first."""
    distributed_timeout_minutes: int = 10
    """After which a collective operation fails."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What came out, the same on every rank."""

    directory: CheckpointDirectory
    card: CheckpointCard
    dtype: str
    seq_length: int
    original_languages: tuple[str, ...]
    """Whatever data there is."""
    notes: tuple[str, ...]
    """What the user should know of how languages were understood."""
    language_groups: list[list[str]]
    """Original languages, then those of each expansion but the latest, to which all others belong."""
    datasets: list[DatasetLoss]


def evaluate_checkpoint(plan: EvaluationPlan) -> Evaluation:
    """Check, build, load and run. Every rank must call it.

    Raises:
        UserError: a checkpoint, dataset, language or layout that does not fit.
    """
    check_timeout(plan.distributed_timeout_minutes)
    with kept_for_reading(plan.load, plan.base_checkpoint) as iteration:
        return _evaluate(dataclasses.replace(plan, load=iteration))


def _evaluate(plan: EvaluationPlan) -> Evaluation:
    directory = open_checkpoint(plan.load, plan.verify, plan.base_checkpoint)
    shape, card = model_shape(directory), directory.card()
    _check_sizes(plan, shape)
    fingerprint = load_tokenizer(directory.side_directory).fingerprint if card.tokenizer_files else None
    entries = read_blend(plan.valid_data_path, "--valid-data-path", tokenizer_fingerprint=fingerprint)
    languages = LanguageRegistry(entry.language for entry in entries)
    check_token_ids(entries, shape.architecture.vocab_size, str(directory.path))
    original = read_original_languages(plan.original_languages, languages.names, original_languages(card.history))
    check_layout(shape, plan.layout)

    platform = select_platform(plan.platform)
    initialize_parallel(platform, plan.layout, timeout_minutes=plan.distributed_timeout_minutes)
    dtype = choose_dtype(plan.dtype, card.compute_dtype, platform)
    say_dtype(plan.dtype, card.compute_dtype, card.dtype, platform)
    with long_work(f"loading {directory.path}"):
        model = load_model(directory, plan.layout, platform, ComputeOptions(dtype=dtype), verified=plan.verify)
        check_finite_weights(model.chunks, directory.path)
    groups = groups_with_prior(card.history, original.names, shape.num_groups)
    table = languages.group_table(groups).to(platform.device)
    datasets = _datasets(entries, languages, plan.seq_length)
    found = (
        evaluate_dataset(model.chunks, model.config, shape, dataset, table, platform.device, plan.micro_batch_size)
        for dataset in datasets
    )
    results = [result for result in found if result is not None]
    check_finite_losses(results, directory.path, dtype)
    precision = str(dtype).removeprefix("torch.")
    notes = (*original.notes, *unknown_languages(languages.names, original.names, card.history))
    return Evaluation(directory, card, precision, plan.seq_length, original.names, notes, groups, results)


def unknown_languages(names: Sequence[str], original: Sequence[str], history: Sequence[Mapping[str, Any]]) -> list[str]:
    """A note on languages that nothing is known of, and which the mean of the expanded ones counts all the same.

    Args:
        names: languages of the datasets.
        original: those that the flag or the history names.
        history: of the checkpoint; without any training in it there is nothing to compare with.
    """
    trained = {language for entry in history for language in trained_languages(entry)}
    unknown = sorted(set(names) - covered(names, [*original, *trained])) if trained else []
    if not unknown:
        return []
    return [
        f"--original-languages: {', '.join(map(language_title, unknown))} of the data was neither called original nor "
        "trained on, and counts as expanded; name what the dense model knows"
    ]


def _check_sizes(plan: EvaluationPlan, shape: ModelShape) -> None:
    longest = shape.architecture.max_position_embeddings
    if not 1 <= plan.seq_length <= longest:
        raise UserError(f"--seq-length {plan.seq_length}: from 1 to the model's {longest} positions")
    if plan.micro_batch_size < 1:
        raise UserError(f"--micro-batch-size {plan.micro_batch_size}: must be at least 1")
    plan.layout.check_sequence(plan.seq_length)
    if not plan.valid_data_path:
        raise UserError("--valid-data-path: give the datasets to evaluate on")


def _datasets(entries: list[BlendEntry], languages: LanguageRegistry, seq_length: int) -> list[ValidationDataset]:
    return [ValidationDataset(entry, languages.id(entry.language), seq_length, entry.manifest.eod) for entry in entries]
