"""What an export writes, checked before anything is written."""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard, read_json
from megatron_moe_lpr.checkpoint.format.chain import TensorReader, checkpoint_chain, open_reader
from megatron_moe_lpr.checkpoint.format.directory import CARD_FILE, CONFIG_FILE, CheckpointDirectory
from megatron_moe_lpr.checkpoint.loading.verification import open_checkpoint, verify_all
from megatron_moe_lpr.conversion.hugging_face.engine import Engine
from megatron_moe_lpr.conversion.hugging_face.hf_config import (
    moe_config,
    with_both_rope_spellings,
    without_foreign_fields,
)
from megatron_moe_lpr.conversion.hugging_face.llama_cpp import llama_cpp_form
from megatron_moe_lpr.conversion.hugging_face.safetensors_writer import TensorSpec
from megatron_moe_lpr.conversion.hugging_face.stock_fields import SHARED_EXPERT_WIDTH
from megatron_moe_lpr.conversion.reading import check_model_tensors
from megatron_moe_lpr.conversion.tensors.blocks import mark_inserted
from megatron_moe_lpr.conversion.tensors.extra_tensors import ExtraTensor, extra_tensors
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.configuration.rope_parameters import transformers_4_rope
from megatron_moe_lpr.model.tensors import DENSE_LAYOUT, MOE_LAYOUTS, Layout, Row, model_rows

DTYPE_FIELDS = ("dtype", "torch_dtype")


@dataclasses.dataclass(frozen=True)
class CheckedExport:
    """The Hugging Face checkpoint that an export writes, and the checkpoint that it is read from."""

    checkpoint: CheckpointDirectory
    card: CheckpointCard
    architecture: Architecture
    layout: Layout
    config: dict
    """The content of config.json."""
    rows: list[Row]
    reader: TensorReader
    engine: Engine
    warnings: tuple[str, ...]
    """Differences between what the exported model and the checkpoint compute, for the user."""
    is_original: bool | None = None
    """The dense model's weights are unchanged since its import, to the bit; None: not known before they are written."""

    def specs(self) -> list[TensorSpec]:
        """All tensors of the Hugging Face checkpoint, in the order in which they are written.

        Each keeps its dtype, so that no weight is rounded; an extended vocabulary has one that holds old and new rows.
        Routers are float32: rounded to bfloat16, they would send a few tokens to another expert.
        """
        written: dict[str, TensorSpec] = {}
        for row in self.rows:
            dtype = torch.float32 if row.kind.is_router else self.reader.tensors[row.key].dtype
            for name, shape in zip(row.names, row.shapes, strict=True):
                if row.rows and name in written:
                    # New rows of the vocabulary, below those that come before.
                    dtype, shape = torch.promote_types(dtype, written[name].dtype), (row.rows[1], *shape[1:])
                written[name] = TensorSpec(name, shape, dtype)
        dtypes = {spec.name: spec.dtype for spec in written.values()}
        return [*written.values()] + [
            TensorSpec(extra.name, extra.shape, self._extra_dtype(extra, dtypes)) for extra in self.extra()
        ]

    def _extra_dtype(self, extra: ExtraTensor, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
        if extra.is_router:
            return torch.float32
        return getattr(torch, self.card.dtype) if extra.copy_of is None else dtypes[extra.copy_of]

    def extra(self) -> list[ExtraTensor]:
        """Tensors that the stock architecture needs and the model does not have."""
        return extra_tensors(self.architecture, self.card.experts_per_layer, self.layout, SHARED_EXPERT_WIDTH)


def check_export(
    load: Path, engine: Engine = "transformers", verified: bool = True, base: Path | None = None
) -> CheckedExport:
    """Check that a checkpoint is whole and undamaged and that a stock architecture can hold it.

    Raises:
        UserError: a damaged file, a tensor that is missing or left over, or a model that has no stock form.
    """
    checkpoint = open_checkpoint(load, verified, base)
    if verified:
        for one in checkpoint_chain(checkpoint):
            verify_all(one.path)
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
        warnings += _unserved(architecture)
    else:
        config = _dense_config(config, architecture)
    if engine == "llama.cpp" and architecture.mixture:
        raise UserError(
            f"--for llama.cpp: {architecture.family.architecture} with more experts has not been tried there; export "
            "it for transformers, whose form llama.cpp's converter may read"
        )
    if engine == "llama.cpp":
        config, layout, warnings = llama_cpp_form(config, architecture, layout, card)
    if card.added_rows:
        config = config | {"vocab_size": architecture.vocab_size + card.added_rows}
    rows = model_rows(architecture, card.experts_per_layer, layout, card.expansions, card.new_tokens)
    rows = mark_inserted(rows, architecture.num_layers, card.inserted_blocks)
    reader = open_reader(checkpoint)
    check_model_tensors(rows, reader)
    config = _with_dtype(config, [reader.tensors[row.key].dtype for row in rows if _decides_dtype(row)])
    return CheckedExport(checkpoint, card, architecture, layout, config, rows, reader, engine, warnings)


def _unserved(architecture: Architecture) -> tuple[str, ...]:
    heads = architecture.num_attention_heads
    if architecture.family.moe_model_type != "qwen2_moe" or architecture.head_dim * heads == architecture.hidden_size:
        return ()
    return (
        f"heads of dimension {architecture.head_dim}: vLLM takes {architecture.hidden_size} / {heads} for a Qwen2-MoE "
        "and cannot serve this export; transformers 5 reads head_dim",
    )


def _decides_dtype(row: Row) -> bool:
    """Whether the dtype in config.json must hold this tensor exactly: matrices, but no routers, norms or biases, which
    readers cast to the matrices' dtype, as they do in the dense model."""
    return not row.kind.is_router and len(row.shape) > 1


def _with_dtype(config: dict, dtypes: Collection[torch.dtype]) -> dict:
    """The configuration with the smallest dtype that holds all weights exactly, in which readers load the model.

    For example float32 where trained weights are bfloat16 and the dense model's float16.
    """
    name = str(functools.reduce(torch.promote_types, dtypes)).removeprefix("torch.")
    fields = [field for field in DTYPE_FIELDS if field in config]
    if not fields and len(set(dtypes)) > 1:
        # Without it readers take the dtype of the first tensor. transformers 4 and 5 know this name.
        fields = ["torch_dtype"]
    return config | dict.fromkeys(fields, name)


def _dense_config(config: dict, architecture: Architecture) -> dict:
    """The dense model's own configuration, changed only where a reader would silently read something else from it."""
    config = without_foreign_fields(config)
    if config.get("attention_bias") and not architecture.family.qkv_bias:
        config = config | {"attention_bias": False}
    if "rope_parameters" in config or transformers_4_rope(config) != architecture.rope:
        config = with_both_rope_spellings(config, architecture)
    return config
