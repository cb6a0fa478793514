"""Megatron -> Hugging Face: a stock MoE architecture, or the dense family where no layer has experts."""

import dataclasses
import shutil
from pathlib import Path

import torch

from megatron_moe_lpr.checkpoint.card import CheckpointCard, read_json
from megatron_moe_lpr.checkpoint.directory import (
    CARD_FILE,
    CONFIG_FILE,
    SIDE_DIRECTORY,
    CheckpointDirectory,
    resolve_checkpoint,
)
from megatron_moe_lpr.checkpoint.reader import CheckpointReader, is_model_key
from megatron_moe_lpr.conversion.hf_config import SHARED_EXPERT_WIDTH, moe_config
from megatron_moe_lpr.conversion.hf_directory import carry_files
from megatron_moe_lpr.conversion.names import (
    DENSE_LAYOUT,
    MOE_LAYOUTS,
    VOCABULARY_KEYS,
    Layout,
    Role,
    Row,
    model_rows,
    shared_expert_shapes,
)
from megatron_moe_lpr.conversion.safetensors_writer import TensorSpec, write_safetensors
from megatron_moe_lpr.conversion.side_files import check_disk_space, check_separate, write_json
from megatron_moe_lpr.conversion.upcycling import split_qkv
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.filesystem import atomic_directory
from megatron_moe_lpr.model.architecture import Architecture
from megatron_moe_lpr.progress import ProgressReport


@dataclasses.dataclass(frozen=True)
class ExportPlan:
    """A checked export."""

    checkpoint: CheckpointDirectory
    card: CheckpointCard
    architecture: Architecture
    layout: Layout
    config: dict
    rows: list[Row]
    reader: CheckpointReader
    dtype: torch.dtype

    def specs(self) -> list[TensorSpec]:
        """All tensors of the Hugging Face checkpoint, in the order they are written.

        Routers keep float32: rounded to bfloat16, they would send a few tokens to another expert.
        """
        written = [
            TensorSpec(name, shape, torch.float32 if row.role is Role.ROUTER else self.dtype)
            for row in self.rows
            for name, shape in zip(row.names, row.shapes, strict=True)
        ]
        return written + [TensorSpec(name, shape, self.dtype) for name, shape in self.zeros().items()]

    def zeros(self) -> dict[str, tuple[int, ...]]:
        """Shared experts that the stock architecture wants and the model does not have."""
        return shared_expert_shapes(self.architecture, self.card.experts_per_layer, self.layout, SHARED_EXPERT_WIDTH)


def export_hf(load: Path, hf: Path, max_shard_bytes: int, overwrite: bool = False) -> ExportPlan:
    """Write the Hugging Face directory `hf` from a Megatron checkpoint.

    Raises:
        UserError: the checkpoint is damaged or the stock architecture cannot hold it; nothing is left at `hf`.
        OSError: the disk is full; nothing is left at `hf`.
    """
    check_separate(load, "--load", hf, "--hf")
    plan = plan_export(load)
    specs = plan.specs()
    total = sum(spec.num_bytes for spec in specs)
    with atomic_directory(hf, overwrite) as partial:
        check_disk_space(partial, total)
        with ProgressReport("exporting", total) as progress:
            write_safetensors(partial, specs, _Producer(plan, progress), max_shard_bytes)
        _write_side_files(plan, partial)
    return plan


def plan_export(load: Path) -> ExportPlan:
    """Read the card and the index and check that every tensor is there and no other.

    Raises:
        UserError: something does not fit.
    """
    checkpoint = resolve_checkpoint(load)
    card, architecture = checkpoint.card(), checkpoint.architecture()
    config = _with_dtype(read_json(checkpoint.side_directory / CONFIG_FILE), card.dtype)
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
    rows = model_rows(architecture, card.experts_per_layer, layout, card.expansions)
    reader = CheckpointReader(checkpoint.path)
    check_model_tensors(rows, reader)
    return ExportPlan(checkpoint, card, architecture, layout, config, rows, reader, getattr(torch, card.dtype))


def _with_dtype(config: dict, dtype: str) -> dict:
    """The configuration naming the dtype of the weights, which training may have changed."""
    return config | {name: dtype for name in ("dtype", "torch_dtype") if name in config}


def check_model_tensors(rows: list[Row], reader: CheckpointReader) -> None:
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


def read_row(row: Row, reader: CheckpointReader, architecture: Architecture, dtype: torch.dtype) -> list[torch.Tensor]:
    """The Hugging Face tensors of one row: query, key and value apart, the vocabulary's padding cut off."""
    tensor = reader.read(row.key)
    parts = split_qkv(tensor, architecture) if len(row.shapes) > 1 else (tensor[: row.shapes[0][0]],)
    return [part.reshape(shape).to(dtype) for part, shape in zip(parts, row.shapes, strict=True)]


class _Producer:
    """Gives the tensors that `ExportPlan.specs` announces; query, key and value are read at once."""

    def __init__(self, plan: ExportPlan, progress: ProgressReport) -> None:
        self.plan, self.progress = plan, progress
        self.rows = {name: row for row in plan.rows for name in row.names}
        self.ready: dict[str, torch.Tensor] = {}

    def __call__(self, spec: TensorSpec) -> torch.Tensor:
        self.progress.advance(spec.num_bytes, {"MB": spec.num_bytes / 1e6})
        if spec.name not in self.rows:
            return torch.zeros(spec.shape, dtype=spec.dtype)
        if spec.name not in self.ready:
            row = self.rows[spec.name]
            tensors = read_row(row, self.plan.reader, self.plan.architecture, spec.dtype)
            self.ready = dict(zip(row.names, tensors, strict=True))
        return self.ready.pop(spec.name)


def _write_side_files(plan: ExportPlan, directory: Path) -> None:
    side = plan.checkpoint.side_directory
    carry_files(side, directory)
    if plan.config == read_json(side / CONFIG_FILE):
        shutil.copyfile(side / CONFIG_FILE, directory / CONFIG_FILE)
    else:
        write_json(plan.config, directory / CONFIG_FILE)
    target = directory / SIDE_DIRECTORY
    target.mkdir()
    shutil.copyfile(side / CONFIG_FILE, target / CONFIG_FILE)
    plan.card.write(target / CARD_FILE)
