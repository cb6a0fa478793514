"""Expansion: new experts for further languages; the experts that the model already has stay frozen from then on."""

import contextlib
import dataclasses
import math
from pathlib import Path

import torch

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard, check_experts
from megatron_moe_lpr.checkpoint.format.chain import TensorReader, checkpoint_chain, open_reader, resolve_and_hold
from megatron_moe_lpr.checkpoint.format.directory import (
    CARD_FILE,
    LATEST_FILE,
    RELEASE,
    SIDE_DIRECTORY,
    write_latest,
)
from megatron_moe_lpr.checkpoint.format.writer import CheckpointWriter
from megatron_moe_lpr.checkpoint.loading.verification import open_checkpoint, verify_all
from megatron_moe_lpr.conversion.added_experts import chosen_experts
from megatron_moe_lpr.conversion.expand_options import ExpandOptions, added_experts
from megatron_moe_lpr.conversion.expanded_vocabulary import (
    card_with_vocabulary,
    further_rows,
    open_extension_of_checkpoint,
    side_files,
)
from megatron_moe_lpr.conversion.hugging_face.hf_directory import carry_files
from megatron_moe_lpr.conversion.import_options import FROM_FLAG
from megatron_moe_lpr.conversion.imported_languages import EXPANDED_FLAG, ORIGINAL_FLAG
from megatron_moe_lpr.conversion.reading import check_model_tensors
from megatron_moe_lpr.conversion.side_files import check_disk_space, check_separate
from megatron_moe_lpr.conversion.upcycling import initial_router
from megatron_moe_lpr.data.language_groups import EXPANSION, learned_languages
from megatron_moe_lpr.errors import UserError, name_file_in_oserror
from megatron_moe_lpr.files.atomic_directory import atomic_directory
from megatron_moe_lpr.files.checksum_file import write_checksums
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.model.tensors import MEGATRON_PROJECTIONS, MOE_LAYOUTS, Row, is_vocabulary_key, model_rows
from megatron_moe_lpr.parallel.experts import check_expert_parallel, check_mixture_parallel
from megatron_moe_lpr.progress import ProgressReport

# Only to identify tensors: names in any layout that has experts would do, and nothing is read or written by them.
NAMES = MOE_LAYOUTS["qwen3_moe"]


def expand(options: ExpandOptions, save: Path, overwrite: bool = False) -> CheckpointCard:
    """Write the checkpoint `save`, which is `load` with new experts, and return its card.

    New experts are copies of the original one. Routers keep their rows and get a drawn row for each new expert, whose
    weight in the routing is 0 at first, so that the model computes exactly what it did. Of a mixture base the new
    experts and their rows are copies of original ones (`options.new_experts_from`). With `options.tokenizer` its
    new tokens get rows of their own; those of earlier vocabulary extensions stay frozen, as the earlier experts do.

    Raises:
        UserError: `load` cannot be expanded with these options; nothing is left at `save`.
        OSError: the disk is full; nothing is left at `save`.
    """
    check_separate(options.load, "--load", save, "--save")
    if options.tokenizer:
        check_separate(options.tokenizer, "--tokenizer", save, "--save")
    with contextlib.ExitStack() as lock:
        iteration = lock.enter_context(resolve_and_hold(options.load, options.base_checkpoint))
        return _write_expanded(dataclasses.replace(options, load=iteration), save, overwrite, lock)


def _write_expanded(options: ExpandOptions, save: Path, overwrite: bool, lock: contextlib.ExitStack) -> CheckpointCard:
    """Check and write. Releasing `lock` raises if a file was deleted while it was read, so it is released before the
    output gets its name."""
    checkpoint = open_checkpoint(options.load, options.verify, options.base_checkpoint)
    for one in checkpoint_chain(checkpoint):
        check_separate(one.path, "the checkpoint", save, "--save")
    before, architecture = checkpoint.card(), checkpoint.architecture()
    added = _checked_counts(before, options)
    copied = _copied(before, added, options)
    expanded = _card(before, options, added, copied)
    extension = open_extension_of_checkpoint(options.tokenizer, checkpoint, before) if options.tokenizer else None
    files = side_files(checkpoint, options.tokenizer)
    after = card_with_vocabulary(expanded, extension, files)
    reader = open_reader(checkpoint)
    had = model_rows(architecture, before.experts_per_layer, NAMES, before.expansions, before.new_tokens)
    check_model_tensors(had, reader)
    rows = model_rows(architecture, after.experts_per_layer, NAMES, after.expansions, after.new_tokens)
    sources = _sources(had, rows, copied)
    total = sum(math.prod(row.shape) * reader.tensors[sources[row.key] or had[0].key].dtype.itemsize for row in rows)
    for one in checkpoint_chain(checkpoint) if options.verify else ():
        verify_all(one.path)
    with name_file_in_oserror(save), atomic_directory(save, overwrite, (LATEST_FILE,)) as partial:
        check_disk_space(partial, total, save)
        iteration = partial / RELEASE
        with CheckpointWriter(iteration, {"iteration": 0}) as writer, ProgressReport("expanding", total) as progress:
            for row in rows:
                if extension and row.kind is ParameterKind.NEW_ROWS:
                    tensor = further_rows(row, had, reader, extension)
                else:
                    tensor = _tensor(row, sources[row.key], reader, options.seed, copied)
                writer.write(row.key, tensor)
                progress.advance(tensor.nbytes, {"MB": tensor.nbytes / 1e6})
        carry_files(files, iteration / SIDE_DIRECTORY)
        after.write(iteration / SIDE_DIRECTORY / CARD_FILE)
        write_checksums(iteration, writer.checksums)
        write_latest(partial, None)
        lock.close()
    return after


def check_expansion(options: ExpandOptions) -> list[int]:
    """Return the new experts of each layer, once it is checked that the checkpoint can get them.

    Raises:
        UserError: `load` cannot be expanded with these options.
    """
    with resolve_and_hold(options.load, options.base_checkpoint) as iteration:
        before = open_checkpoint(iteration, options.verify, options.base_checkpoint).card()
    return _checked_counts(before, options)


def _checked_counts(before: CheckpointCard, options: ExpandOptions) -> list[int]:
    """New experts of each layer. Raises UserError where the checkpoint cannot be expanded so."""
    added, base = added_experts(options.add_experts, before.experts_per_layer), before.base_experts
    _check_trained(before, options)
    if len(added) != len(before.experts_per_layer) or min(added) < 0 or not any(added):
        raise UserError(
            f"--add-experts: numbers of 0 or more for {len(before.experts_per_layer)} layers are expected, not all 0"
        )
    for own, *counts in zip(base, _earlier(before), added, strict=True):
        _check_expert_parallel(own, counts, options.expert_model_parallel_size)
    if before.has_mixture_base and any(count and own == 1 for count, own in zip(added, base, strict=True)):
        raise UserError("--add-experts: a layer of the mixture base without a router cannot get experts; give it 0")
    check_experts([one + more for one, more in zip(before.experts_per_layer, added, strict=True)], "--add-experts")
    return added


def _check_trained(before: CheckpointCard, options: ExpandOptions) -> None:
    if not before.is_moe:
        raise UserError(f"--load {options.load}: is dense; export it, then upcycle what export wrote by import")
    if before.openness < 1:
        raise UserError(f"--load {options.load}: its latest experts are not trained in yet; finish stage 1 first")
    if not learned_languages(before.history):
        raise UserError(
            f"--load {options.load}: no stage 1 in its history, so the languages of its experts are not known: train "
            f"it first, or, if they were trained elsewhere, import it again with {ORIGINAL_FLAG} and {EXPANDED_FLAG}"
        )


def _earlier(before: CheckpointCard) -> list[int]:
    """Experts of each layer beside the original ones, of all expansions so far together."""
    return [experts - own for experts, own in zip(before.experts_per_layer, before.base_experts, strict=True)]


def _card(before: CheckpointCard, options: ExpandOptions, added: list[int], copied: list[list[int]]) -> CheckpointCard:
    """The card of the expanded checkpoint."""
    made = {"copied": copied} if copied else {"router_seed": options.seed}
    return dataclasses.replace(
        before,
        format_version=CheckpointCard.format_version,
        parent=None,
        experts_per_layer=[one + more for one, more in zip(before.experts_per_layer, added, strict=True)],
        expansions=[*(before.expansions or [_earlier(before)]), added],
        openness=0.0,
        history=[*before.history, {"stage": EXPANSION, "new_experts": added, **made}],
    )


def _check_expert_parallel(base: int, new: list[int], size: int) -> None:
    """Check that EP ranks can share the experts of a layer.

    Args:
        base: its original experts.
        new: those of earlier expansions together, and of this one; 0: none.
    """
    if base > 1:
        check_mixture_parallel(base, new, size)
    else:
        for count in filter(None, new):
            check_expert_parallel(count, size)


def _copied(before: CheckpointCard, added: list[int], options: ExpandOptions) -> list[list[int]]:
    """By layer the base experts that new ones copy, where the base model is a mixture; else empty.

    Raises:
        UserError: numbers that do not fit, or a choice where there is a single original expert to copy.
    """
    given = options.new_experts_from
    if before.has_mixture_base:
        return chosen_experts(given, added, before.base_experts, options.seed)
    if given is not None:
        raise UserError(f"{FROM_FLAG}: is for a base model that is a mixture, and that of {options.load} is dense")
    return []


def _sources(had: list[Row], rows: list[Row], copied: list[list[int]]) -> dict[str, str | None]:
    """Which tensor of the present checkpoint each tensor of the expanded one is read from, by key.

    Args:
        had: rows of the present checkpoint.
        rows: rows of the expanded checkpoint.
        copied: by layer the base experts that new ones copy, where the base model is a mixture.

    Returns:
        For a new expert the key of the original expert that it copies; None for the router of a layer that was dense
        and for new rows of the vocabulary.
    """
    keys = {_identity(row): row.key for row in had}
    originals = {
        (row.layer, _matrix(row)): keys[row.dense_names] for row in rows if row.kind is ParameterKind.ORIGINAL_EXPERT
    }
    sources = {row.key: keys.get(_identity(row), originals.get((row.layer, _matrix(row)))) for row in rows}
    for layer, experts in enumerate(copied):
        place = f"decoder.layers.{layer}.mlp.experts"
        for number, expert in enumerate(experts):
            for matrix in MEGATRON_PROJECTIONS:
                sources[f"{place}.newest.experts.{number}.{matrix}"] = f"{place}.base.experts.{expert}.{matrix}"
    return sources


def _identity(row: Row) -> tuple[str, ...]:
    """What a tensor is called before and after the expansion alike; rows of a vocabulary or of a router may share
    Hugging Face's name."""
    return (row.key,) if is_vocabulary_key(row.key) or row.kind.is_router else row.dense_names or row.names


def _matrix(row: Row) -> str:
    """The matrix of an FFN or expert without the expert's place, for example `linear_fc1.weight_w`."""
    return ".".join(row.key.split(".")[-2:])


def _tensor(row: Row, source: str | None, reader: TensorReader, seed: int, copied: list[list[int]]) -> torch.Tensor:
    """One tensor of the expanded checkpoint."""
    if row.kind is ParameterKind.ROUTER and row.layer is not None and copied:
        base = reader.read(row.key.removesuffix("weight") + "base_rows")
        present = reader.read(source) if source else base[:0]
        return torch.cat((present, base[copied[row.layer]]))
    if row.kind is ParameterKind.ROUTER and row.layer is not None:
        num_experts, hidden_size = row.shape
        weight = initial_router(num_experts, hidden_size, seed, row.layer)
        if source:
            present = reader.read(source)
            weight[: len(present)] = present
        return weight
    if source is None:
        raise UserError(f"{reader.directory}: the checkpoint has nothing to make {row.key} of")
    tensor = reader.read(source)
    # Training pads the vocabulary, a converted checkpoint does not.
    return tensor[: row.shape[0]].clone() if is_vocabulary_key(row.key) else tensor
