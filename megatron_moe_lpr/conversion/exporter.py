"""Megatron -> Hugging Face: a stock MoE architecture, or the dense family where no layer has experts."""

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard, read_json
from megatron_moe_lpr.checkpoint.format.directory import (
    CARD_FILE,
    CONFIG_FILE,
    SIDE_DIRECTORY,
    CheckpointDirectory,
)
from megatron_moe_lpr.checkpoint.format.reader import is_model_key
from megatron_moe_lpr.checkpoint.format.trainable_only import TensorReader, kept_for_reading, layers_of, open_reader
from megatron_moe_lpr.checkpoint.loading.verification import open_checkpoint, verify_all, warn
from megatron_moe_lpr.conversion.hugging_face.base_model import BASE_MODEL_FILE, MODEL_CARD, read_base_model
from megatron_moe_lpr.conversion.hugging_face.engine import Engine
from megatron_moe_lpr.conversion.hugging_face.exported_tokenizer import settle_tokenizer
from megatron_moe_lpr.conversion.hugging_face.hf_config import (
    CODE_FIELDS,
    SHARED_EXPERT_WIDTH,
    moe_config,
    with_both_rope_spellings,
    without_foreign_fields,
)
from megatron_moe_lpr.conversion.hugging_face.hf_directory import TRAINING_DTYPES, carried_files, carry_files
from megatron_moe_lpr.conversion.hugging_face.llama_cpp import llama_cpp_form
from megatron_moe_lpr.conversion.hugging_face.model_card import CardOptions, model_card
from megatron_moe_lpr.conversion.hugging_face.safetensors_writer import TensorSpec, write_safetensors
from megatron_moe_lpr.conversion.side_files import check_disk_space, check_separate, write_json
from megatron_moe_lpr.conversion.tensors.blocks import mark_inserted
from megatron_moe_lpr.conversion.tensors.extra_tensors import ExtraTensor, extra_tensors
from megatron_moe_lpr.conversion.tensors.fingerprint import OriginalFingerprint
from megatron_moe_lpr.conversion.tensors.upcycling import split_qkv
from megatron_moe_lpr.errors import UserError, naming
from megatron_moe_lpr.files.links import copy_private
from megatron_moe_lpr.files.output_directory import atomic_directory
from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.configuration.rope_parameters import rope_of_transformers_4
from megatron_moe_lpr.model.finite import is_finite
from megatron_moe_lpr.model.tensors import (
    DENSE_LAYOUT,
    MOE_LAYOUTS,
    VOCABULARY_KEYS,
    Layout,
    Role,
    Row,
    model_rows,
)
from megatron_moe_lpr.progress import ProgressReport

GENERATION_FILE = "generation_config.json"
DTYPE_FIELDS = ("dtype", "torch_dtype")
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


@dataclasses.dataclass(frozen=True)
class ExportPlan:
    """A checked export."""

    checkpoint: CheckpointDirectory
    card: CheckpointCard
    architecture: Architecture
    layout: Layout
    config: dict
    rows: list[Row]
    reader: TensorReader
    engine: Engine
    warnings: tuple[str, ...]
    """What the exported model does not compute as the checkpoint does."""
    is_original: bool | None = None
    """The weights of the dense model are its own, to the bit; None: not written yet."""

    def specs(self) -> list[TensorSpec]:
        """All tensors of the Hugging Face checkpoint, in the order they are written.

        Each in its own dtype: the dense model's weights are its bits, and trained ones lose nothing. Routers are
        float32: rounded to bfloat16, they would send a few tokens to another expert.
        """
        written = [
            TensorSpec(name, shape, torch.float32 if row.role is Role.ROUTER else self.reader.tensors[row.key].dtype)
            for row in self.rows
            for name, shape in zip(row.names, row.shapes, strict=True)
        ]
        dtypes = {spec.name: spec.dtype for spec in written}
        return written + [TensorSpec(extra.name, extra.shape, self._dtype_of(extra, dtypes)) for extra in self.extra()]

    def _dtype_of(self, extra: ExtraTensor, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
        if extra.is_router:
            return torch.float32
        return getattr(torch, self.card.dtype) if extra.copy_of is None else dtypes[extra.copy_of]

    def extra(self) -> list[ExtraTensor]:
        """Tensors that the stock architecture wants and the model does not have."""
        return extra_tensors(self.architecture, self.card.experts_per_layer, self.layout, SHARED_EXPERT_WIDTH)


def export_hf(
    load: Path,
    hf: Path,
    max_shard_bytes: int,
    overwrite: bool = False,
    verified: bool = True,
    base: Path | None = None,
    engine: Engine = "transformers",
    card_options: CardOptions | None = None,
) -> ExportPlan:
    """Write the Hugging Face directory `hf` from a Megatron checkpoint.

    Args:
        verified: compare every file with its checksum first.
        engine: `transformers` is the stock form, which vLLM and SGLang read too; `llama.cpp` is for its converter.
        card_options: what the model card says that the checkpoint does not know.

    Raises:
        UserError: the checkpoint is damaged or the stock architecture cannot hold it; nothing is left at `hf`.
        OSError: the disk is full; nothing is left at `hf`.
    """
    options = card_options or CardOptions()
    check_separate(load, "--load", hf, "--hf")
    if options.evaluation:
        check_separate(options.evaluation, "--evaluation", hf, "--hf")
    with contextlib.ExitStack() as lock:
        iteration = lock.enter_context(kept_for_reading(load, base))
        plan = plan_export(iteration, engine, verified, base)
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


def _card_text(plan: ExportPlan, options: CardOptions) -> str:
    side = plan.checkpoint.side_directory
    return model_card(side, read_base_model(side), plan.card, plan.engine, options, bool(plan.is_original))


def _write_weights(plan: ExportPlan, partial: Path, max_shard_bytes: int, target: Path) -> ExportPlan:
    """Write the safetensors files. Returns the plan with what the fingerprint of the written weights says."""
    specs = plan.specs()
    total, fingerprint = sum(spec.num_bytes for spec in specs), OriginalFingerprint()
    check_disk_space(partial, total, target)
    with ProgressReport("exporting", total) as progress, ThreadPoolExecutor(1) as pool:
        producer = _Producer(plan, progress, fingerprint, pool)
        write_safetensors(partial, specs, producer, max_shard_bytes)
        producer.finish()
    return _with_verdict(plan, fingerprint.hexdigest())


def _with_verdict(plan: ExportPlan, fingerprint: str) -> ExportPlan:
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


def plan_export(
    load: Path, engine: Engine = "transformers", verified: bool = True, base: Path | None = None
) -> ExportPlan:
    """Verify the files, read the card and the index and check that every tensor is there and no other.

    Raises:
        UserError: something does not fit.
    """
    checkpoint = open_checkpoint(load, verified, base)
    if verified:
        for layer in layers_of(checkpoint):
            verify_all(layer.path)
    card, architecture = checkpoint.card(), checkpoint.architecture()
    config = read_json(checkpoint.side_directory / CONFIG_FILE)
    warnings: tuple[str, ...] = ()
    if len(card.experts_per_layer) != architecture.num_layers or card.family != architecture.family.name:
        raise UserError(f"{checkpoint.side_directory}: {CARD_FILE} and {CONFIG_FILE} do not belong to one model")
    layout = DENSE_LAYOUT
    if card.openness < 1:
        raise UserError(
            f"{load}: the experts of its latest expansion weigh {card.openness:.0%} in the routers, and a stock model "
            "has no such weight; train them first (stage 1, to the end of --open-experts-iters)"
        )
    if card.is_moe:
        config = moe_config(config, architecture, card.experts_per_layer, card.top_k)
        layout = MOE_LAYOUTS[architecture.family.moe_model_type]
    else:
        config = _dense_config(config, architecture)
    if engine == "llama.cpp":
        config, layout, warnings = llama_cpp_form(config, architecture, layout, card)
    rows = model_rows(architecture, card.experts_per_layer, layout, card.expansions)
    rows = mark_inserted(rows, architecture.num_layers, card.inserted_blocks)
    reader = open_reader(checkpoint)
    check_model_tensors(rows, reader)
    config = _with_dtype(config, [reader.tensors[row.key].dtype for row in rows if _decides_dtype(row)])
    return ExportPlan(checkpoint, card, architecture, layout, config, rows, reader, engine, warnings)


def _decides_dtype(row: Row) -> bool:
    """Matrices do. Readers cast norms and biases to these, as they do in the dense model, and routers as they like."""
    return row.role is not Role.ROUTER and len(row.shape) > 1


def _with_dtype(config: dict, dtypes: Collection[torch.dtype]) -> dict:
    """The configuration naming the least dtype that holds all weights exactly: readers load a model in that one.

    float32 where trained weights are bfloat16 and the dense model's float16, for example.
    """
    name = str(functools.reduce(torch.promote_types, dtypes)).removeprefix("torch.")
    fields = [field for field in DTYPE_FIELDS if field in config]
    if not fields and len(set(dtypes)) > 1:
        # Else readers take the dtype of whichever tensor comes first. transformers 4 and 5 know this name.
        fields = ["torch_dtype"]
    return config | dict.fromkeys(fields, name)


def _dense_config(config: dict, architecture: Architecture) -> dict:
    """As it came, but where a reader would take something else from it without a word."""
    config = without_foreign_fields(config)
    if config.get("attention_bias") and not architecture.family.qkv_bias:
        config = config | {"attention_bias": False}
    if "rope_parameters" in config or rope_of_transformers_4(config) != architecture.rope:
        config = with_both_rope_spellings(config, architecture)
    return config


def check_model_tensors(rows: list[Row], reader: TensorReader) -> None:
    """Check that the checkpoint holds the model's tensors in their shapes and no other model tensor.

    Optimizer state and whatever else training saves beside the model is not looked at.

    Raises:
        UserError: naming the tensors that are missing, unexpected or of the wrong shape or dtype.
    """
    expected = {row.key: row.shape for row in rows}
    present = {key for key in reader.tensors if is_model_key(key)}
    for keys, problem in ((expected.keys() - present, "lacks"), (present - expected.keys(), "has no place for")):
        if keys:
            names = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise UserError(f"{reader.directory}: the checkpoint {problem} {names}")
    for key, shape in expected.items():
        found = reader.tensors[key].shape
        if reader.tensors[key].dtype not in TRAINING_DTYPES:
            raise UserError(f"{reader.directory}: {key} has dtype {reader.tensors[key].dtype}, which no model here has")
        padded = key in VOCABULARY_KEYS and found[0] >= shape[0] and found[1:] == shape[1:]
        if found != shape and not padded:
            raise UserError(f"{reader.directory}: {key} has shape {list(found)}, the model wants {list(shape)}")


def read_row(row: Row, reader: TensorReader, architecture: Architecture) -> list[torch.Tensor]:
    """The Hugging Face tensors of one row in the stored dtype (routers: float32): query, key and value apart, the
    vocabulary's padding cut off."""
    tensor = reader.read(row.key)
    if not is_finite(tensor):
        raise UserError(
            f"{reader.directory}: {row.key} holds NaN or infinite values; use a checkpoint from before they appeared"
        )
    parts = split_qkv(tensor, architecture) if len(row.shapes) > 1 else (tensor[: row.shapes[0][0]],)
    shaped = [part.reshape(shape) for part, shape in zip(parts, row.shapes, strict=True)]
    return [part.float() for part in shaped] if row.role is Role.ROUTER else shaped


class _Producer:
    """Gives the tensors that `ExportPlan.specs` announces; query, key and value are read at once."""

    def __init__(
        self, plan: ExportPlan, progress: ProgressReport, fingerprint: OriginalFingerprint, pool: ThreadPoolExecutor
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
        if row.role.is_original:
            pairs = zip(row.dense_names, tensors, strict=True)
            self.hashing = [self.pool.submit(self.fingerprint.add, name, tensor.contiguous()) for name, tensor in pairs]

    def finish(self) -> None:
        """Wait until the fingerprint has all tensors that were given."""
        for future in self.hashing:
            future.result()
        self.hashing = []


def _write_side_files(plan: ExportPlan, directory: Path, files: Mapping[str, Path], text: str) -> None:
    side = plan.checkpoint.side_directory
    carry_files(files, directory)
    if not (directory / GENERATION_FILE).is_file():
        # Servers stop at the tokens that it names.
        write_json(_generation_config(plan.config), directory / GENERATION_FILE)
    for name in (TOKENIZER_CONFIG_FILE, GENERATION_FILE):
        drop_code_references(directory / name)
    (directory / MODEL_CARD).write_text(text, encoding="utf-8")
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
