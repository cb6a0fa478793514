"""Evaluate a checkpoint on validation datasets."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard
from megatron_moe_lpr.checkpoint.format.chain import resolve_and_hold
from megatron_moe_lpr.checkpoint.format.directory import CheckpointDirectory
from megatron_moe_lpr.checkpoint.loading.model import load_model, model_shape
from megatron_moe_lpr.checkpoint.loading.verification import open_checkpoint
from megatron_moe_lpr.data.language_groups import groups_with_prior, original_languages, trained_languages
from megatron_moe_lpr.data.language_names import covered, language_title
from megatron_moe_lpr.data.original_languages import read_original_languages
from megatron_moe_lpr.data.reading.blend import BlendEntry, read_blend
from megatron_moe_lpr.data.reading.config import packed
from megatron_moe_lpr.data.reading.languages import LanguageRegistry
from megatron_moe_lpr.data.reading.packed_samples import packing_notes
from megatron_moe_lpr.data.reading.validation_dataset import ValidationDataset, open_validation_dataset
from megatron_moe_lpr.data.reading.vocabulary import check_token_ids
from megatron_moe_lpr.data.tokenizer import load_tokenizer
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.finite import check_finite_losses, check_finite_weights
from megatron_moe_lpr.evaluation.losses import DatasetLoss, evaluate_dataset
from megatron_moe_lpr.evaluation.options import EvaluationOptions
from megatron_moe_lpr.liveness import long_work
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.config import ModelShape, check_layout
from megatron_moe_lpr.model.configuration.context import check_documents_apart
from megatron_moe_lpr.model.configuration.dtype import choose_dtype, report_dtype
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import check_timeout
from megatron_moe_lpr.platform import select_platform


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results of `evaluate_checkpoint`, the same on every rank."""

    directory: CheckpointDirectory
    card: CheckpointCard
    dtype: str
    seq_length: int
    reset_attention_mask: bool
    """Whether no document saw another."""
    original_languages: tuple[str, ...]
    """All original languages, with or without a dataset."""
    notes: tuple[str, ...]
    """Messages for the user about how language names were read."""
    language_groups: list[list[str]]
    """The original languages, then the languages of each expansion but the latest; all others belong to the latest."""
    datasets: list[DatasetLoss]


def evaluate_checkpoint(options: EvaluationOptions) -> Evaluation:
    """Load a checkpoint at any layout and evaluate it on each dataset. Every rank must call it.

    Raises:
        UserError: the checkpoint is damaged, or a dataset, language or layout does not fit it.
    """
    check_timeout(options.distributed_timeout_minutes)
    asked = options.dtype  # flags that contradict each other fail before the checkpoint is read
    with resolve_and_hold(options.load, options.base_checkpoint) as iteration:
        return _evaluate(dataclasses.replace(options, load=iteration), asked)


def _evaluate(options: EvaluationOptions, asked: torch.dtype | None) -> Evaluation:
    directory = open_checkpoint(options.load, options.verify, options.base_checkpoint)
    shape, card = model_shape(directory), directory.card()
    _check_sizes(options, shape)
    fingerprint = load_tokenizer(directory.side_directory).fingerprint if card.tokenizer_files else None
    blend = read_blend(
        options.valid_data_path,
        "--valid-data-path",
        tokenizer_fingerprint=fingerprint,
        earlier_tokenizers=card.earlier_tokenizers,
    )
    entries = packed(blend, options.documents)
    languages = LanguageRegistry(entry.language for entry in entries)
    check_token_ids(entries, shape.total_vocab_size, str(directory.path))
    original = read_original_languages(options.original_languages, languages.names, original_languages(card.history))
    check_layout(shape, options.layout)
    datasets = _open_datasets(options, entries, languages)

    platform = select_platform(options.platform, options.layout.tensor_model_parallel_size, options.transformer_impl)
    keeps_apart = any(dataset.documents_apart.reset_attention_mask for dataset in datasets)
    check_documents_apart(options.layout, platform, keeps_apart)
    initialize_parallel(platform, options.layout, timeout_minutes=options.distributed_timeout_minutes)
    dtype = choose_dtype(asked, card.compute_dtype, platform)
    report_dtype(asked, card.compute_dtype, card.dtype, platform)
    with long_work(f"loading {directory.path}"):
        compute = ComputeOptions().with_dtype(dtype)
        model = load_model(directory, options.layout, platform, compute, verified=options.verify)
        check_finite_weights(model.chunks, directory.path)
    groups = groups_with_prior(card.history, original.names, shape.num_groups)
    table = languages.group_table(groups).to(platform.device)
    results = []
    for dataset in datasets:
        result = evaluate_dataset(
            model.chunks, model.config, shape, dataset, table, platform.device, options.micro_batch_size
        )
        assert result is not None  # only `after_pass` ends an evaluation early
        results.append(result)
    check_finite_losses(results, directory.path, dtype)
    precision = str(dtype).removeprefix("torch.")
    notes = (
        *original.notes,
        *unknown_languages(languages.names, original.names, card.history),
        *packing_notes(entries, options.seq_length),
    )
    apart = options.documents.reset_attention_mask
    return Evaluation(directory, card, precision, options.seq_length, apart, original.names, notes, groups, results)


def _open_datasets(
    options: EvaluationOptions, entries: Sequence[BlendEntry], languages: LanguageRegistry
) -> list[ValidationDataset]:
    """Open all datasets, which checks them. Raises UserError."""
    return [
        open_validation_dataset(
            entry,
            languages.id(entry.language),
            options.seq_length,
            entry.manifest.eod,
            documents_apart=options.documents,
        )
        for entry in entries
    ]


def unknown_languages(names: Sequence[str], original: Sequence[str], history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a note about languages that are neither original nor trained on, but count as expanded languages.

    Args:
        names: languages of the datasets.
        original: original languages, from the flag or the history.
        history: training history of the checkpoint; without any training in it there is no note.
    """
    trained = {language for entry in history for language in trained_languages(entry)}
    unknown = sorted(set(names) - covered(names, [*original, *trained])) if trained else []
    if not unknown:
        return []
    return [
        f"--original-languages: {', '.join(map(language_title, unknown))} of the data was neither called original nor "
        "trained on, and counts as expanded; name what the dense model knows"
    ]


def _check_sizes(options: EvaluationOptions, shape: ModelShape) -> None:
    longest = shape.architecture.max_position_embeddings
    if not 1 <= options.seq_length <= longest:
        raise UserError(f"--seq-length {options.seq_length}: from 1 to the model's {longest} positions")
    if options.micro_batch_size < 1:
        raise UserError(f"--micro-batch-size {options.micro_batch_size}: must be at least 1")
    options.layout.check_sequence(options.seq_length)
    options.documents.check()
    if not options.valid_data_path:
        raise UserError("--valid-data-path: give the datasets to evaluate on")
