"""Megatron -> Hugging Face: a stock MoE architecture, or the dense family where no layer has experts."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_moe_lpr.checkpoint.format.card import read_json
from megatron_moe_lpr.checkpoint.format.chain import checkpoint_chain, resolve_and_hold
from megatron_moe_lpr.checkpoint.format.directory import CARD_FILE, CONFIG_FILE, SIDE_DIRECTORY
from megatron_moe_lpr.checkpoint.loading.verification import warn
from megatron_moe_lpr.conversion.checked_export import CheckedExport, check_export
from megatron_moe_lpr.conversion.hugging_face.base_model import BASE_MODEL_FILE, MODEL_CARD_FILE, read_base_model
from megatron_moe_lpr.conversion.hugging_face.engine import Engine
from megatron_moe_lpr.conversion.hugging_face.exported_tokenizer import settle_tokenizer
from megatron_moe_lpr.conversion.hugging_face.hf_config import CODE_FIELDS
from megatron_moe_lpr.conversion.hugging_face.hf_directory import carried_files, carry_files
from megatron_moe_lpr.conversion.hugging_face.model_card import ModelCardOptions, model_card
from megatron_moe_lpr.conversion.hugging_face.safetensors_writer import TensorSpec, write_safetensors
from megatron_moe_lpr.conversion.reading import read_row
from megatron_moe_lpr.conversion.side_files import check_disk_space, check_separate, write_json
from megatron_moe_lpr.conversion.tensors.fingerprint import OriginalFingerprint
from megatron_moe_lpr.conversion.tensors.fused import StoredForm, stored_tensors
from megatron_moe_lpr.errors import name_file_in_oserror
from megatron_moe_lpr.files.atomic_directory import atomic_directory
from megatron_moe_lpr.files.links import copy_private
from megatron_moe_lpr.model.tensors import Row
from megatron_moe_lpr.progress import ProgressReport

GENERATION_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


def export_hf(
    load: Path,
    hf: Path,
    max_shard_bytes: int,
    overwrite: bool = False,
    verified: bool = True,
    base: Path | None = None,
    engine: Engine = "transformers",
    model_card_options: ModelCardOptions | None = None,
) -> CheckedExport:
    """Write the Hugging Face directory `hf` from a Megatron checkpoint.

    Args:
        verified: compare every file with its checksum first.
        engine: `transformers` is the stock form, which vLLM and SGLang read too; `llama.cpp` is for its converter.
        model_card_options: what the model card says that the checkpoint does not know.

    Raises:
        UserError: the checkpoint is damaged or the stock architecture cannot hold it; nothing is left at `hf`.
        OSError: the disk is full; nothing is left at `hf`.
    """
    options = model_card_options or ModelCardOptions()
    check_separate(load, "--load", hf, "--hf")
    if options.evaluation:
        check_separate(options.evaluation, "--evaluation", hf, "--hf")
    with contextlib.ExitStack() as lock:
        iteration = lock.enter_context(resolve_and_hold(load, base))
        export = check_export(iteration, engine, verified, base)
        for one in checkpoint_chain(export.checkpoint):
            check_separate(one.path, "the checkpoint", hf, "--hf")
        files = carried_files(export.checkpoint.side_directory)
        _card_text(export, options)  # reads its inputs before anything is written
        with name_file_in_oserror(hf), atomic_directory(hf, overwrite, (CONFIG_FILE,)) as partial:
            export = _write_weights(export, partial, max_shard_bytes, hf)
            _write_side_files(export, partial, files, _card_text(export, options))
            # Releasing raises if a file was deleted while it was read: before the output gets its name.
            lock.close()
    return export


def _card_text(export: CheckedExport, options: ModelCardOptions) -> str:
    side = export.checkpoint.side_directory
    return model_card(side, read_base_model(side), export.card, export.engine, options, bool(export.is_original))


def _write_weights(export: CheckedExport, partial: Path, max_shard_bytes: int, target: Path) -> CheckedExport:
    """Write the safetensors files. Returns the export with `is_original`, and a warning where it is unexpected."""
    specs = export.specs()
    total, fingerprint = sum(spec.num_bytes for spec in specs), OriginalFingerprint()
    check_disk_space(partial, total, target)
    with ProgressReport("exporting", total) as progress, ThreadPoolExecutor(1) as pool:
        producer = _Producer(export, progress, fingerprint, pool)
        stored, produce = _as_stored(specs, producer, export)
        write_safetensors(partial, stored, produce, max_shard_bytes)
        producer.finish()
    return _with_fingerprint(export, fingerprint.hexdigest())


def _with_fingerprint(export: CheckedExport, fingerprint: str) -> CheckedExport:
    is_original = fingerprint == export.card.original_fingerprint
    trained = any(
        entry.get("stage") == "full" or entry.get("train_embeddings") or entry.get("train_base_router")
        for entry in export.card.history
    )
    warnings = export.warnings
    if not is_original and not trained:
        warnings += (
            f"{export.checkpoint.path}: the dense model's weights are not its own to the bit, though no run has "
            "trained them: versions before format 4 rounded them to what a run computed in; the model card says so",
        )
    return dataclasses.replace(export, is_original=is_original, warnings=warnings)


def _as_stored(
    specs: Sequence[TensorSpec], produce: Callable[[TensorSpec], torch.Tensor], export: CheckedExport
) -> tuple[list[TensorSpec], Callable[[TensorSpec], torch.Tensor]]:
    """Specifications and producer of the tensors that the files store, some made of several parts."""
    form = StoredForm(str(export.config["model_type"]), export.architecture.head_dim)
    by_name = {spec.name: spec for spec in specs}
    shapes, fused = {spec.name: spec.shape for spec in specs}, stored_tensors(by_name, form)
    parts = {part: tensor for tensor in fused for part in tensor.parts}
    stored: dict[str, TensorSpec] = {}
    for spec in specs:
        name, shape = spec.name, spec.shape
        if tensor := parts.get(spec.name):
            name, shape = tensor.name, tensor.shape(shapes)
        dtype = torch.promote_types(spec.dtype, stored[name].dtype) if name in stored else spec.dtype
        stored[name] = TensorSpec(name, shape, dtype)
    joined = {tensor.name: tensor for tensor in fused}

    def produce_stored(spec: TensorSpec) -> torch.Tensor:
        if spec.name not in joined:
            return produce(spec)
        return joined[spec.name].join(lambda part: produce(by_name[part]))

    return [*stored.values()], produce_stored


class _Producer:
    """Reads tensors in the order of `CheckedExport.specs`; query, key and value are read together."""

    def __init__(
        self,
        export: CheckedExport,
        progress: ProgressReport,
        fingerprint: OriginalFingerprint,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.export, self.progress = export, progress
        self.fingerprint, self.pool = fingerprint, pool
        self.hashing: list[Future[None]] = []
        self.rows: dict[str, list[Row]] = {}
        """By Hugging Face name: one row, or the parts of an extended vocabulary."""
        for row in export.rows:
            for name in row.names:
                self.rows.setdefault(name, []).append(row)
        self.extra = {extra.name: extra.copy_of for extra in export.extra()}
        self.ready: dict[str, torch.Tensor] = {}

    def __call__(self, spec: TensorSpec) -> torch.Tensor:
        self.progress.advance(spec.num_bytes, {"MB": spec.num_bytes / 1e6})
        if spec.name in self.extra:
            copied = self.extra[spec.name]
            if copied is None:
                return torch.zeros(spec.shape, dtype=spec.dtype)
            return self._read(self.rows[copied][0])[0]
        if len(self.rows[spec.name]) > 1:
            return self._whole_vocabulary(spec)
        if spec.name not in self.ready:
            row = self.rows[spec.name][0]
            tensors = self._read(row)
            self.ready = dict(zip(row.names, tensors, strict=True))
            self._hash(row, tensors)
        return self.ready.pop(spec.name)

    def _read(self, row: Row) -> list[torch.Tensor]:
        return read_row(row, self.export.reader, self.export.architecture)

    def _whole_vocabulary(self, spec: TensorSpec) -> torch.Tensor:
        """The dense model's rows with those of all vocabulary extensions below them."""
        whole = torch.empty(spec.shape, dtype=spec.dtype)
        for row in self.rows[spec.name]:
            tensors = self._read(row)
            self._hash(row, tensors)
            first, end = row.rows or (0, len(whole))
            whole[first:end] = tensors[0]
        return whole

    def _hash(self, row: Row, tensors: list[torch.Tensor]) -> None:
        """Hash a row's tensors while the next row is read: no more than two rows are in memory."""
        self.finish()
        if row.kind.is_original:
            pairs = zip(row.dense_names, tensors, strict=True)
            self.hashing = [self.pool.submit(self.fingerprint.add, name, tensor.contiguous()) for name, tensor in pairs]

    def finish(self) -> None:
        """Wait for the hashes of all tensors read so far."""
        for future in self.hashing:
            future.result()
        self.hashing = []


def _write_side_files(export: CheckedExport, directory: Path, files: Mapping[str, Path], text: str) -> None:
    side = export.checkpoint.side_directory
    carry_files(files, directory)
    if not (directory / GENERATION_FILE).is_file():
        # It names the tokens at which servers stop.
        write_json(_generation_config(export.config), directory / GENERATION_FILE)
    for name in (TOKENIZER_CONFIG_FILE, GENERATION_FILE):
        drop_code_references(directory / name)
    (directory / MODEL_CARD_FILE).write_text(text, encoding="utf-8")
    if export.config == read_json(side / CONFIG_FILE):
        copy_private(side / CONFIG_FILE, directory / CONFIG_FILE)
    else:
        write_json(export.config, directory / CONFIG_FILE)
    for warning in settle_tokenizer(directory):
        warn(warning)
    target = directory / SIDE_DIRECTORY
    target.mkdir()
    copy_private(side / CONFIG_FILE, target / CONFIG_FILE)
    if base_model := read_base_model(side):
        write_json(base_model.as_json(), target / BASE_MODEL_FILE)
    # An exported model is complete.
    dataclasses.replace(export.card, parent=None).write(target / CARD_FILE)


def drop_code_references(path: Path) -> None:
    """Remove from a JSON file the fields that name Python code, which an export does not carry."""
    fields = read_json(path) if path.is_file() else {}
    if any(name in fields for name in CODE_FIELDS):
        write_json({name: value for name, value in fields.items() if name not in CODE_FIELDS}, path)


def _generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}
