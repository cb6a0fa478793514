"""Megatron -> Hugging Face: a stock MoE architecture, or the dense family where no layer has experts."""

import contextlib
import dataclasses
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_moe_lpr.checkpoint.format.card import read_json
from megatron_moe_lpr.checkpoint.format.directory import CARD_FILE, CONFIG_FILE, SIDE_DIRECTORY
from megatron_moe_lpr.checkpoint.format.trainable_only import kept_for_reading, layers_of
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
from megatron_moe_lpr.errors import naming
from megatron_moe_lpr.files.links import copy_private
from megatron_moe_lpr.files.output_directory import atomic_directory
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
        iteration = lock.enter_context(kept_for_reading(load, base))
        plan = check_export(iteration, engine, verified, base)
        for layer in layers_of(plan.checkpoint):
            check_separate(layer.path, "the checkpoint", hf, "--hf")
        files = carried_files(plan.checkpoint.side_directory)
        _card_text(plan, options)  # reads its inputs before anything is written
        with naming(hf), atomic_directory(hf, overwrite, (CONFIG_FILE,)) as partial:
            plan = _write_weights(plan, partial, max_shard_bytes, hf)
            _write_side_files(plan, partial, files, _card_text(plan, options))
            # Before the output gets its name: the end of the lock tells whether all was there to read.
            lock.close()
    return plan


def _card_text(plan: CheckedExport, options: ModelCardOptions) -> str:
    side = plan.checkpoint.side_directory
    return model_card(side, read_base_model(side), plan.card, plan.engine, options, bool(plan.is_original))


def _write_weights(plan: CheckedExport, partial: Path, max_shard_bytes: int, target: Path) -> CheckedExport:
    """Write the safetensors files. Returns the plan with what the fingerprint of the written weights says."""
    specs = plan.specs()
    total, fingerprint = sum(spec.num_bytes for spec in specs), OriginalFingerprint()
    check_disk_space(partial, total, target)
    with ProgressReport("exporting", total) as progress, ThreadPoolExecutor(1) as pool:
        producer = _Producer(plan, progress, fingerprint, pool)
        write_safetensors(partial, specs, producer, max_shard_bytes)
        producer.finish()
    return _with_verdict(plan, fingerprint.hexdigest())


def _with_verdict(plan: CheckedExport, fingerprint: str) -> CheckedExport:
    """The plan with what the fingerprint of the written weights says about them."""
    is_original = fingerprint == plan.card.original_fingerprint
    trained = any(entry.get("stage") == "full" or entry.get("train_embeddings") for entry in plan.card.history)
    warnings = plan.warnings
    if not is_original and not trained:
        warnings += (
            f"{plan.checkpoint.path}: the dense model's weights are not its own to the bit, though no run has trained "
            "them: versions before format 4 rounded them to what a run computed in; the model card says so",
        )
    return dataclasses.replace(plan, is_original=is_original, warnings=warnings)


class _Producer:
    """Gives the tensors that `CheckedExport.specs` announces; query, key and value are read at once."""

    def __init__(
        self, plan: CheckedExport, progress: ProgressReport, fingerprint: OriginalFingerprint, pool: ThreadPoolExecutor
    ) -> None:
        self.plan, self.progress = plan, progress
        self.fingerprint, self.pool = fingerprint, pool
        self.hashing: list[Future[None]] = []
        self.rows = {name: row for row in plan.rows for name in row.names}
        self.extra = {extra.name: extra.copy_of for extra in plan.extra()}
        self.ready: dict[str, torch.Tensor] = {}

    def __call__(self, spec: TensorSpec) -> torch.Tensor:
        self.progress.advance(spec.num_bytes, {"MB": spec.num_bytes / 1e6})
        if spec.name in self.extra:
            copied = self.extra[spec.name]
            if copied is None:
                return torch.zeros(spec.shape, dtype=spec.dtype)
            return read_row(self.rows[copied], self.plan.reader, self.plan.architecture)[0]
        if spec.name not in self.ready:
            row = self.rows[spec.name]
            tensors = read_row(row, self.plan.reader, self.plan.architecture)
            self.ready = dict(zip(row.names, tensors, strict=True))
            self._hash(row, tensors)
        return self.ready.pop(spec.name)

    def _hash(self, row: Row, tensors: list[torch.Tensor]) -> None:
        """Beside writing; one row at a time, so that no more than two are in memory."""
        self.finish()
        if row.kind.is_original:
            pairs = zip(row.dense_names, tensors, strict=True)
            self.hashing = [self.pool.submit(self.fingerprint.add, name, tensor.contiguous()) for name, tensor in pairs]

    def finish(self) -> None:
        """Wait until the fingerprint has all tensors that were given."""
        for future in self.hashing:
            future.result()
        self.hashing = []


def _write_side_files(plan: CheckedExport, directory: Path, files: Mapping[str, Path], text: str) -> None:
    side = plan.checkpoint.side_directory
    carry_files(files, directory)
    if not (directory / GENERATION_FILE).is_file():
        # Servers stop at the tokens that it names.
        write_json(_generation_config(plan.config), directory / GENERATION_FILE)
    for name in (TOKENIZER_CONFIG_FILE, GENERATION_FILE):
        drop_code_references(directory / name)
    (directory / MODEL_CARD_FILE).write_text(text, encoding="utf-8")
    if plan.config == read_json(side / CONFIG_FILE):
        copy_private(side / CONFIG_FILE, directory / CONFIG_FILE)
    else:
        write_json(plan.config, directory / CONFIG_FILE)
    for warning in settle_tokenizer(directory):
        warn(warning)
    target = directory / SIDE_DIRECTORY
    target.mkdir()
    copy_private(side / CONFIG_FILE, target / CONFIG_FILE)
    if base_model := read_base_model(side):
        write_json(base_model.as_json(), target / BASE_MODEL_FILE)
    # An exported model is complete.
    dataclasses.replace(plan.card, base=None).write(target / CARD_FILE)


def drop_code_references(path: Path) -> None:
    """Rewrite a JSON file without the fields that name code, which an export does not carry; else leave it as it is."""
    fields = read_json(path) if path.is_file() else {}
    if any(name in fields for name in CODE_FIELDS):
        write_json({name: value for name, value in fields.items() if name not in CODE_FIELDS}, path)


def _generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}
