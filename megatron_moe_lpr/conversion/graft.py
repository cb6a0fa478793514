"""Grafting (DeltaMoE, arXiv 2605.18083): what post-training changed in the base model is added to every new expert.

Shared weights and the original expert are still the base model's, since no stage trains them. In their place come the
instruct model's own, to the bit.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard, tool_versions
from megatron_moe_lpr.checkpoint.format.chain import TensorReader, checkpoint_chain, open_reader, resolve_and_hold
from megatron_moe_lpr.checkpoint.format.directory import (
    CARD_FILE,
    CONFIG_FILE,
    LATEST_FILE,
    RELEASE,
    SIDE_DIRECTORY,
    CheckpointDirectory,
    write_latest,
)
from megatron_moe_lpr.checkpoint.format.writer import CheckpointWriter
from megatron_moe_lpr.checkpoint.loading.verification import open_checkpoint, verify_all, warn
from megatron_moe_lpr.conversion.expand import NAMES
from megatron_moe_lpr.conversion.graft_checks import (
    check_base,
    check_graftable,
    check_instruct,
    check_shared_weights,
    check_tokenizers,
    open_dense,
    read_parts,
)
from megatron_moe_lpr.conversion.graft_options import GraftOptions
from megatron_moe_lpr.conversion.hugging_face.base_model import BASE_MODEL_FILE, find_base_model
from megatron_moe_lpr.conversion.hugging_face.hf_directory import (
    carried_files,
    carry_files,
    tokenizer_digests,
    with_vocabulary,
)
from megatron_moe_lpr.conversion.reading import check_model_tensors
from megatron_moe_lpr.conversion.side_files import check_disk_space, check_separate, write_json
from megatron_moe_lpr.conversion.tensor_sources import TensorSources
from megatron_moe_lpr.conversion.tensors.fingerprint import OriginalFingerprint
from megatron_moe_lpr.conversion.tensors.new_rows import RowDifferences
from megatron_moe_lpr.conversion.tensors.qkv import interleave_qkv
from megatron_moe_lpr.conversion.upcycling import read_finite
from megatron_moe_lpr.data.tokenizer_extension import TokenizerExtension, read_extension
from megatron_moe_lpr.errors import UserError, name_file_in_oserror
from megatron_moe_lpr.files.atomic_directory import atomic_directory
from megatron_moe_lpr.files.checksum_file import write_checksums
from megatron_moe_lpr.files.links import copy_private
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.model.tensors import Row, model_rows
from megatron_moe_lpr.progress import ProgressReport

GRAFT = "graft"
"""Value of `stage` in the history entry of a graft."""
EXPERTS = (ParameterKind.NEW_EXPERTS, ParameterKind.EARLIER_EXPERTS)
NEW_ROWS = (ParameterKind.NEW_ROWS, ParameterKind.EARLIER_ROWS)


def graft(options: GraftOptions, save: Path, overwrite: bool = False) -> CheckpointCard:
    """Write the checkpoint `save`, which is `load` with the instruct model in place of the base model; return its card.

    - Shared weights and the original expert are the instruct model's, to the bit.
    - A new expert gets scale x (instruct FFN - base FFN) of its layer, computed in float32 and rounded once.
    - Routers stay.

    Raises:
        UserError: the three models do not fit each other; nothing is left at `save`.
        OSError: the disk is full; nothing is left at `save`.
    """
    for flag, path in (("--load", options.load), ("--base", options.base), ("--instruct", options.instruct)):
        check_separate(path, flag, save, "--save")
    with contextlib.ExitStack() as lock:
        iteration = lock.enter_context(resolve_and_hold(options.load, options.base_checkpoint))
        return _write_grafted(dataclasses.replace(options, load=iteration), save, overwrite, lock)


def _write_grafted(options: GraftOptions, save: Path, overwrite: bool, lock: contextlib.ExitStack) -> CheckpointCard:
    """Check and write. Releasing `lock` raises if a file was deleted while it was read, so it is released before the
    output gets its name."""
    checkpoint = open_checkpoint(options.load, options.verify, options.base_checkpoint)
    for one in checkpoint_chain(checkpoint):
        check_separate(one.path, "the checkpoint", save, "--save")
    card = checkpoint.card()
    check_graftable(card, options.load)
    base, instruct = open_dense(options.base, "--base"), open_dense(options.instruct, "--instruct")
    check_shared_weights(card, options.load, base)
    for line in check_instruct(instruct, base, card):
        warn(line)
    check_tokenizers(options.instruct, checkpoint, card)
    files = _side_files(checkpoint, instruct, card)
    rows = model_rows(instruct.model.architecture, card.experts_per_layer, NAMES, card.expansions, card.new_tokens)
    reader = open_reader(checkpoint)
    check_model_tensors(
        model_rows(checkpoint.architecture(), card.experts_per_layer, NAMES, card.expansions, card.new_tokens), reader
    )
    for one in checkpoint_chain(checkpoint) if options.verify else ():
        verify_all(one.path)
    check_base(base, checkpoint, card)
    total = sum(math.prod(row.shape) * reader.tensors[row.key].dtype.itemsize for row in rows)
    with name_file_in_oserror(save), atomic_directory(save, overwrite, (LATEST_FILE,)) as partial:
        check_disk_space(partial, total, save)
        iteration = partial / RELEASE
        source = _GraftedTensors(rows, reader, base, instruct, checkpoint, options)
        with CheckpointWriter(iteration, {"iteration": 0}) as writer, ProgressReport("grafting", total) as progress:
            for row in rows:
                tensor = source.tensor(row)
                writer.write(row.key, tensor)
                progress.advance(tensor.nbytes, {"MB": tensor.nbytes / 1e6})
        grafted = _card(card, options, instruct, source.fingerprint.hexdigest(), tokenizer_digests(files))
        _write_side_files(iteration / SIDE_DIRECTORY, instruct, files, grafted)
        write_checksums(iteration, writer.checksums)
        write_latest(partial, None)
        lock.close()
    return grafted


class _GraftedTensors:
    """Makes each tensor of the grafted checkpoint from those of the three models; few are in memory at a time."""

    def __init__(
        self,
        rows: list[Row],
        reader: TensorReader,
        base: TensorSources,
        instruct: TensorSources,
        checkpoint: CheckpointDirectory,
        options: GraftOptions,
    ) -> None:
        self.reader, self.base, self.instruct, self.options = reader, base, instruct, options
        self.extensions = _extensions(checkpoint, rows, options)
        self.fingerprint = OriginalFingerprint()
        """Of the instruct model's weights, once all tensors are made."""
        self.dense = {row.dense_names: row for row in instruct.rows}
        self.ffn = {_place(row): row.dense_names[0] for row in rows if row.kind is ParameterKind.ORIGINAL_EXPERT}
        """Name of the dense FFN's matrix by layer and matrix of an expert."""
        self.difference: tuple[str, torch.Tensor] | None = None
        self.row_differences: tuple[str, dict[int, torch.Tensor]] | None = None
        """By the id of an extension's first token: how its rows of a matrix change."""

    def tensor(self, row: Row) -> torch.Tensor:
        """Return the tensor of a row of the grafted checkpoint. Raises UserError where it is not finite."""
        if row.kind.is_original:
            return self._original(row)
        tensor = self.reader.read(row.key)
        if row.kind in EXPERTS:
            return _add(tensor, self._ffn_difference(self.ffn[_place(row)]), self.options.scale)
        if row.kind in NEW_ROWS:
            # Training pads the vocabulary, a converted checkpoint does not.
            tensor = tensor[: row.shape[0]].clone()
            if self.options.new_rows == "difference" and len(tensor):
                return _add(tensor, self._rows_difference(row), self.options.scale)
        return tensor

    def _original(self, row: Row) -> torch.Tensor:
        parts = read_parts(self.instruct, self.dense[row.dense_names])
        for name, part in zip(row.dense_names, parts, strict=True):
            self.fingerprint.add(name, part)
        return interleave_qkv(parts, self.instruct.model.architecture) if len(parts) > 1 else parts[0]

    def _ffn_difference(self, name: str) -> torch.Tensor:
        """Instruct minus base, float32; rows of a layer's experts that read the same matrix are neighbours."""
        if self.difference is None or self.difference[0] != name:
            self.difference = (name, read_finite(self.instruct, name).float() - read_finite(self.base, name).float())
        return self.difference[1]

    def _rows_difference(self, row: Row) -> torch.Tensor:
        name = row.names[0]
        if self.row_differences is None or self.row_differences[0] != name:
            differences = RowDifferences(read_finite(self.base, name), read_finite(self.instruct, name))
            found = {one.base_vocab_size: differences.extend(one.pieces) for one in self.extensions}
            self.row_differences = (name, found)
        first, _ = row.rows or (0, 0)
        return self.row_differences[1][first]


def _extensions(checkpoint: CheckpointDirectory, rows: list[Row], options: GraftOptions) -> list[TokenizerExtension]:
    """The vocabulary extensions whose rows change. Raises UserError where the record of one is missing."""
    starts = {row.rows[0] for row in rows if row.kind in NEW_ROWS and row.rows and row.rows[1] > row.rows[0]}
    if not starts or options.new_rows == "unchanged":
        return []
    latest = read_extension(checkpoint.side_directory)
    found = [*latest.earlier, latest] if latest else []
    if starts - {one.base_vocab_size for one in found}:
        raise UserError(
            f"{checkpoint.side_directory}: the record of a vocabulary extension is missing, and with it which "
            "tokens its new tokens replace; give --new-rows unchanged"
        )
    return found


def _add(tensor: torch.Tensor, difference: torch.Tensor, scale: float) -> torch.Tensor:
    """tensor + scale x difference, computed in float32 and rounded once to the tensor's dtype."""
    return (tensor.float() + scale * difference).to(tensor.dtype)


def _place(row: Row) -> tuple[int | None, str]:
    """Layer and matrix of an expert's tensor, without the expert's number: `linear_fc1.weight_w`."""
    return row.layer, ".".join(row.key.split(".")[-2:])


def _card(
    card: CheckpointCard, options: GraftOptions, instruct: TensorSources, fingerprint: str, tokenizer: dict[str, str]
) -> CheckpointCard:
    entry = {
        "stage": GRAFT,
        "instruct": options.instruct.name,
        "base_fingerprint": card.original_fingerprint,
        "scale": options.scale,
    }
    return dataclasses.replace(
        card,
        format_version=CheckpointCard.format_version,
        parent=None,
        dtype=str(instruct.dtype).removeprefix("torch."),
        original_fingerprint=fingerprint,
        tokenizer_files=tokenizer,
        tool_versions=tool_versions(),
        history=[*card.history, entry],
    )


def _side_files(checkpoint: CheckpointDirectory, instruct: TensorSources, card: CheckpointCard) -> dict[str, Path]:
    """Chat template, generation settings, licence and tokenizer of the instruct model, and the extended vocabulary."""
    files = carried_files(instruct.model.path)
    return with_vocabulary(files, checkpoint.side_directory) if card.added_rows else files


def _write_side_files(
    directory: Path, instruct: TensorSources, files: Mapping[str, Path], card: CheckpointCard
) -> None:
    directory.mkdir()
    carry_files(files, directory)
    copy_private(instruct.model.path / CONFIG_FILE, directory / CONFIG_FILE)
    write_json(
        find_base_model(instruct.model.path, exported=instruct.model.card is not None).as_json(),
        directory / BASE_MODEL_FILE,
    )
    card.write(directory / CARD_FILE)
