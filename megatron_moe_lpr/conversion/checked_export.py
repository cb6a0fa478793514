"""What an export writes, checked before anything is written."""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard, read_json
from megatron_moe_lpr.checkpoint.format.directory import CARD_FILE, CONFIG_FILE, CheckpointDirectory
from megatron_moe_lpr.checkpoint.format.trainable_only import TensorReader, layers_of, open_reader
from megatron_moe_lpr.checkpoint.loading.verification import open_checkpoint, verify_all
from megatron_moe_lpr.conversion.hugging_face.engine import Engine
from megatron_moe_lpr.conversion.hugging_face.hf_config import (
    SHARED_EXPERT_WIDTH,
    moe_config,
    with_both_rope_spellings,
    without_foreign_fields,
)
from megatron_moe_lpr.conversion.hugging_face.llama_cpp import llama_cpp_form
from megatron_moe_lpr.conversion.hugging_face.safetensors_writer import TensorSpec
from megatron_moe_lpr.conversion.reading import check_model_tensors
from megatron_moe_lpr.conversion.tensors.blocks import mark_inserted
from megatron_moe_lpr.conversion.tensors.extra_tensors import ExtraTensor, extra_tensors
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.model.configuration.rope_parameters import rope_of_transformers_4
from megatron_moe_lpr.model.tensors import DENSE_LAYOUT, MOE_LAYOUTS, Layout, Row, model_rows

DTYPE_FIELDS = ("dtype", "torch_dtype")


@dataclasses.dataclass(frozen=True)
class CheckedExport:
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
        written: list[TensorSpec] = []
        for row in self.rows:
            dtype = torch.float32 if row.kind is ParameterKind.ROUTER else self.reader.tensors[row.key].dtype
            written += [TensorSpec(name, shape, dtype) for name, shape in zip(row.names, row.shapes, strict=True)]
        dtypes = {spec.name: spec.dtype for spec in written}
        return written + [TensorSpec(extra.name, extra.shape, self._dtype_of(extra, dtypes)) for extra in self.extra()]

    def _dtype_of(self, extra: ExtraTensor, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
        if extra.is_router:
            return torch.float32
        return getattr(torch, self.card.dtype) if extra.copy_of is None else dtypes[extra.copy_of]

    def extra(self) -> list[ExtraTensor]:
        """Tensors that the stock architecture wants and the model does not have."""
        return extra_tensors(self.architecture, self.card.experts_per_layer, self.layout, SHARED_EXPERT_WIDTH)


def check_export(
    load: Path, engine: Engine = "transformers", verified: bool = True, base: Path | None = None
) -> CheckedExport:
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
    return CheckedExport(checkpoint, card, architecture, layout, config, rows, reader, engine, warnings)


def _decides_dtype(row: Row) -> bool:
    """Matrices do. Readers cast norms and biases to these, as they do in the dense model, and routers as they like."""
    return row.kind is not ParameterKind.ROUTER and len(row.shape) > 1


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
