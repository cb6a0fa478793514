"""Hugging Face -> Megatron: a dense model, upcycled or not, an adapter over its base, or an exported MoE."""

import math
from pathlib import Path
from typing import Any

import torch

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard, EarlierTokenizer, tool_versions
from megatron_moe_lpr.checkpoint.format.directory import (
    CARD_FILE,
    CONFIG_FILE,
    LATEST_FILE,
    RELEASE,
    SIDE_DIRECTORY,
    write_latest,
)
from megatron_moe_lpr.checkpoint.format.writer import CheckpointWriter
from megatron_moe_lpr.checkpoint.loading.verification import warn
from megatron_moe_lpr.conversion.hugging_face.base_model import BASE_MODEL_FILE, find_base_model
from megatron_moe_lpr.conversion.hugging_face.hf_directory import (
    carried_files,
    carry_files,
    tokenizer_digests,
    with_tokenizer,
)
from megatron_moe_lpr.conversion.hugging_face.tokenizer_check import check_tokenizer
from megatron_moe_lpr.conversion.import_options import ImportOptions
from megatron_moe_lpr.conversion.side_files import check_disk_space, check_separate, write_json
from megatron_moe_lpr.conversion.tensor_sources import TensorSources, find_tensor_sources
from megatron_moe_lpr.conversion.tensors.blocks import grown_config
from megatron_moe_lpr.conversion.upcycling import upcycle
from megatron_moe_lpr.data.language_groups import ADDED_EXPERTS, IMPORTED_ADAPTER, IMPORTED_MIXTURE
from megatron_moe_lpr.data.tokenizer_extension import TokenizerExtension
from megatron_moe_lpr.data.vocabulary_extension import tokenizers_before
from megatron_moe_lpr.errors import UserError, name_file_in_oserror
from megatron_moe_lpr.files.atomic_directory import atomic_directory
from megatron_moe_lpr.files.checksum_file import write_checksums
from megatron_moe_lpr.files.links import copy_private
from megatron_moe_lpr.progress import ProgressReport


def import_hf(options: ImportOptions, save: Path, overwrite: bool = False) -> CheckpointCard:
    """Write the Megatron checkpoint `save` from a Hugging Face directory and return its card.

    Raises:
        UserError: the source or an option does not fit; nothing is left at `save`.
        OSError: the disk is full; nothing is left at `save`.
    """
    _check_separate(options, save)
    sources = find_tensor_sources(options)
    _check_extra_tensors(sources)
    family, is_moe = sources.model.architecture.family, max(sources.experts_per_layer) > 1
    extended = options.tokenizer if sources.extension else None
    files = carried_files(sources.model.path)
    files = with_tokenizer(files, extended) if extended else files
    exported_type = family.moe_model_type if is_moe else family.name
    for line in check_tokenizer(sources.model.path, exported_type, files, extended):
        warn(line)
    config = _changed_config(sources)
    base_model = find_base_model(sources.model.path, exported=sources.model.card is not None)
    total = sum(math.prod(row.shape) * sources.stored_dtype(row).itemsize for row in sources.rows)
    with name_file_in_oserror(save), atomic_directory(save, overwrite, (LATEST_FILE,)) as partial:
        check_disk_space(partial, total, save)
        iteration = partial / RELEASE
        with CheckpointWriter(iteration, {"iteration": 0}) as writer, ProgressReport("importing", total) as progress:
            fingerprint = upcycle(sources, writer, progress)
        card = _card(sources, fingerprint, tokenizer_digests(files))
        _write_side_files(sources, card, files, config, iteration / SIDE_DIRECTORY)
        write_json(base_model.as_json(), iteration / SIDE_DIRECTORY / BASE_MODEL_FILE)
        write_checksums(iteration, writer.checksums)
        write_latest(partial, None)
    return card


def _check_separate(options: ImportOptions, save: Path) -> None:
    check_separate(options.hf, "--hf", save, "--save")
    if options.tokenizer:
        check_separate(options.tokenizer, "--tokenizer", save, "--save")
    if options.adapter:
        check_separate(options.adapter, "--adapter", save, "--save")
    if options.experts_per_layer and Path(options.experts_per_layer).is_file():
        check_separate(Path(options.experts_per_layer), "--experts-per-layer", save, "--save")


def _check_extra_tensors(sources: TensorSources) -> None:
    for extra in sources.model.extra():
        tensor = sources.files.read(extra.name)
        if extra.copy_of is not None:
            fits, wanted = torch.equal(tensor, sources.files.read(extra.copy_of)), f"is not equal to {extra.copy_of}"
        else:
            fits, wanted = not torch.count_nonzero(tensor), "is not zero"
        if not fits:
            raise UserError(f"{sources.files.file(extra.name)}: {extra.name} {wanted}; {extra.otherwise}")


def _card(sources: TensorSources, fingerprint: str, tokenizer: dict[str, str]) -> CheckpointCard:
    before = sources.model.card
    return CheckpointCard(
        family=sources.model.architecture.family.name,
        experts_per_layer=sources.experts_per_layer,
        top_k=sources.top_k,
        dtype=str(sources.dtype).removeprefix("torch."),
        original_fingerprint=fingerprint,
        router_seed=sources.seed if sources.initialises_routers else before.router_seed if before else None,
        tokenizer_files=tokenizer,
        tool_versions=tool_versions(),
        history=_history(sources),
        expansions=_expansions(sources),
        openness=0.0 if sources.added else 1.0,
        inserted_blocks=sources.inserted_blocks,
        new_tokens=sources.new_tokens,
        earlier_tokenizers=_earlier_tokenizers(before, sources.extension),
    )


def _expansions(sources: TensorSources) -> list[list[int]]:
    """New experts by expansion. Those of a mixture base are an expansion from the beginning: they come in slowly."""
    if sources.added:
        return [sources.added.counts]
    before = sources.model.card
    return before.expansions if before and sources.model.is_moe else []


def _earlier_tokenizers(before: CheckpointCard | None, extension: TokenizerExtension | None) -> list[EarlierTokenizer]:
    earlier = before.earlier_tokenizers if before else []
    return tokenizers_before(extension, earlier) if extension else earlier


def _history(sources: TensorSources) -> list[dict]:
    """The source's own history, then an entry for experts that were trained elsewhere."""
    history = sources.model.card.history if sources.model.card else []
    given = sources.languages.history_fields() if sources.languages else {}
    if sources.adapter:
        return [*history, {"stage": IMPORTED_ADAPTER, "source": sources.adapter.path.name, **given}]
    if given:
        return [*history, {"stage": IMPORTED_MIXTURE, "source": sources.model.path.name, **given}]
    if sources.added:
        return [{"stage": ADDED_EXPERTS, "new_experts": sources.added.counts, "copied": sources.added.copied}]
    return history


def _changed_config(sources: TensorSources) -> dict[str, Any] | None:
    """The dense model's configuration where it is not the source's own file."""
    if sources.inserts:
        return grown_config(sources.model.config, len(sources.experts_per_layer), sources.inserted_blocks)
    is_own = sources.added is not None
    return sources.model.config if (sources.model.is_moe and not is_own) or sources.model.new_tokens else None


def _write_side_files(
    sources: TensorSources, card: CheckpointCard, files: dict[str, Path], config: dict[str, Any] | None, directory: Path
) -> None:
    directory.mkdir()
    carry_files(files, directory)
    if config is None:
        copy_private(sources.model.path / CONFIG_FILE, directory / CONFIG_FILE)
    else:
        write_json(config, directory / CONFIG_FILE)
    card.write(directory / CARD_FILE)
