"""Megatron -> Hugging Face: a stock MoE architecture, or the dense family where no layer has experts."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_moe_lpr.checkpoint.card import CheckpointCard, read_json
from megatron_moe_lpr.checkpoint.directory import (
    CARD_FILE,
    CONFIG_FILE,
    SIDE_DIRECTORY,
    CheckpointDirectory,
)
from megatron_moe_lpr.checkpoint.reader import is_model_key
from megatron_moe_lpr.checkpoint.trainable_only import TensorReader, layers_of, open_reader, reading
from megatron_moe_lpr.checkpoint.verification import open_checkpoint, verify_all, warn
from megatron_moe_lpr.conversion.hugging_face.base_model import BASE_MODEL_FILE, read_base_model
from megatron_moe_lpr.conversion.hugging_face.engine import Engine
from megatron_moe_lpr.conversion.hugging_face.exported_tokenizer import settle_tokenizer
from megatron_moe_lpr.conversion.hugging_face.hf_config import (
    CODE_FIELDS,
    SHARED_EXPERT_WIDTH,
    moe_config,
    with_both_rope_spellings,
    with_dtype,
    without_foreign_fields,
)
from megatron_moe_lpr.conversion.hugging_face.hf_directory import carry_files
from megatron_moe_lpr.conversion.hugging_face.llama_cpp import llama_cpp_form
from megatron_moe_lpr.conversion.hugging_face.model_card import CardOptions, write_model_card
from megatron_moe_lpr.conversion.hugging_face.safetensors_writer import TensorSpec, write_safetensors
from megatron_moe_lpr.conversion.side_files import check_disk_space, check_separate, write_json
from megatron_moe_lpr.conversion.tensors.extra_tensors import ExtraTensor, extra_tensors
from megatron_moe_lpr.conversion.tensors.names import (
    DENSE_LAYOUT,
    MOE_LAYOUTS,
    VOCABULARY_KEYS,
    Layout,
    Role,
    Row,
    model_rows,
)
from megatron_moe_lpr.conversion.tensors.upcycling import split_qkv
from megatron_moe_lpr.errors import UserError, naming
from megatron_moe_lpr.filesystem import atomic_directory
from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.configuration.rope_parameters import rope_of_transformers_4
from megatron_moe_lpr.model.finite import is_finite
from megatron_moe_lpr.progress import ProgressReport

GENERATION_FILE = "generation_config.json"
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
    dtype: torch.dtype
    engine: Engine
    warnings: tuple[str, ...]
    """What the exported model does not compute as the checkpoint does."""

    def specs(self) -> list[TensorSpec]:
        """All tensors of the Hugging Face checkpoint, in the order they are written.

        Routers keep float32: rounded to bfloat16, they would send a few tokens to another expert.
        """
        written = [
            TensorSpec(name, shape, torch.float32 if row.role is Role.ROUTER else self.dtype)
            for row in self.rows
            for name, shape in zip(row.names, row.shapes, strict=True)
        ]
        return written + [
            TensorSpec(extra.name, extra.shape, torch.float32 if extra.is_router else self.dtype)
            for extra in self.extra()
        ]

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
    check_separate(load, "--load", hf, "--hf")
    plan = plan_export(load, engine, verified, base)
    specs = plan.specs()
    total = sum(spec.num_bytes for spec in specs)
    with reading(plan.checkpoint), naming(hf), atomic_directory(hf, overwrite) as partial:
        check_disk_space(partial, total)
        with ProgressReport("exporting", total) as progress:
            write_safetensors(partial, specs, _Producer(plan, progress), max_shard_bytes)
        _write_side_files(plan, partial, card_options or CardOptions())
    return plan


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
    config = with_dtype(read_json(checkpoint.side_directory / CONFIG_FILE), card.dtype)
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
    reader = open_reader(checkpoint)
    check_model_tensors(rows, reader)
    dtype = getattr(torch, card.dtype)
    return ExportPlan(checkpoint, card, architecture, layout, config, rows, reader, dtype, engine, warnings)


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
        UserError: naming the tensors that are missing, unexpected or of the wrong shape.
    """
    expected = {row.key: row.shape for row in rows}
    present = {key for key in reader.tensors if is_model_key(key)}
    for keys, problem in ((expected.keys() - present, "lacks"), (present - expected.keys(), "has no place for")):
        if keys:
            names = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise UserError(f"{reader.directory}: the checkpoint {problem} {names}")
    for key, shape in expected.items():
        found = reader.tensors[key].shape
        padded = key in VOCABULARY_KEYS and found[0] >= shape[0] and found[1:] == shape[1:]
        if found != shape and not padded:
            raise UserError(f"{reader.directory}: {key} has shape {list(found)}, the model wants {list(shape)}")


def read_row(row: Row, reader: TensorReader, architecture: Architecture, dtype: torch.dtype) -> list[torch.Tensor]:
    """The Hugging Face tensors of one row: query, key and value apart, the vocabulary's padding cut off."""
    tensor = reader.read(row.key)
    if not is_finite(tensor):
        raise UserError(
            f"{reader.directory}: {row.key} holds NaN or infinite values; use a checkpoint from before they appeared"
        )
    parts = split_qkv(tensor, architecture) if len(row.shapes) > 1 else (tensor[: row.shapes[0][0]],)
    return [part.reshape(shape).to(dtype) for part, shape in zip(parts, row.shapes, strict=True)]


class _Producer:
    """Gives the tensors that `ExportPlan.specs` announces; query, key and value are read at once."""

    def __init__(self, plan: ExportPlan, progress: ProgressReport) -> None:
        self.plan, self.progress = plan, progress
        self.rows = {name: row for row in plan.rows for name in row.names}
        self.extra = {extra.name: extra.copy_of for extra in plan.extra()}
        self.ready: dict[str, torch.Tensor] = {}

    def __call__(self, spec: TensorSpec) -> torch.Tensor:
        self.progress.advance(spec.num_bytes, {"MB": spec.num_bytes / 1e6})
        if spec.name in self.extra:
            copied = self.extra[spec.name]
            if copied is None:
                return torch.zeros(spec.shape, dtype=spec.dtype)
            return read_row(self.rows[copied], self.plan.reader, self.plan.architecture, spec.dtype)[0]
        if spec.name not in self.ready:
            row = self.rows[spec.name]
            tensors = read_row(row, self.plan.reader, self.plan.architecture, spec.dtype)
            self.ready = dict(zip(row.names, tensors, strict=True))
        return self.ready.pop(spec.name)


def _write_side_files(plan: ExportPlan, directory: Path, card_options: CardOptions) -> None:
    side = plan.checkpoint.side_directory
    carry_files(side, directory)
    if not (directory / GENERATION_FILE).is_file():
        # Servers stop at the tokens that it names.
        write_json(_generation_config(plan.config), directory / GENERATION_FILE)
    for name in (TOKENIZER_CONFIG_FILE, GENERATION_FILE):
        drop_code_references(directory / name)
    base_model = read_base_model(side)
    write_model_card(directory, base_model, plan.card, plan.engine, card_options)
    if plan.config == read_json(side / CONFIG_FILE):
        shutil.copyfile(side / CONFIG_FILE, directory / CONFIG_FILE)
    else:
        write_json(plan.config, directory / CONFIG_FILE)
    for warning in settle_tokenizer(directory):
        warn(warning)
    target = directory / SIDE_DIRECTORY
    target.mkdir()
    shutil.copyfile(side / CONFIG_FILE, target / CONFIG_FILE)
    if base_model:
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
