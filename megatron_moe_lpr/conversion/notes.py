"""Notes that an import prints: fields that it does not read, and what the export of this model will look like."""

from pathlib import Path

import torch

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard
from megatron_moe_lpr.checkpoint.format.directory import CONFIG_FILE, SIDE_DIRECTORY
from megatron_moe_lpr.conversion.hugging_face.adapter import CONFIG_FILE as ADAPTER_CONFIG
from megatron_moe_lpr.conversion.hugging_face.base_model import find_base_model
from megatron_moe_lpr.conversion.hugging_face.hf_config import CODE_FIELDS
from megatron_moe_lpr.conversion.hugging_face.hf_directory import HFDirectory, open_hf_directory
from megatron_moe_lpr.conversion.import_options import ImportOptions
from megatron_moe_lpr.conversion.imported_languages import EXPANDED_FLAG, ORIGINAL_FLAG
from megatron_moe_lpr.conversion.tensors.extra_tensors import equal_expert_bytes
from megatron_moe_lpr.data.language_groups import learned_languages
from megatron_moe_lpr.data.original_languages import parse_languages
from megatron_moe_lpr.files.json_files import read_json
from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.configuration.rope_parameters import unread_rope_fields
from megatron_moe_lpr.model.tensors import MOE_LAYOUTS


def import_notes(options: ImportOptions, card: CheckpointCard) -> list[str]:
    """Notes for the user, a line each; usually none.

    Args:
        card: card of the checkpoint that the import wrote.
    """
    hf = options.hf
    model = open_hf_directory(hf, upcycled_elsewhere=not card.has_mixture_base)
    return [
        *_languages(options, card),
        *_adapter_base(options, hf),
        *_unread_fields(hf, model),
        *_equal_experts(model.architecture, card),
        *_other_dtypes(model, card),
    ]


def _languages(options: ImportOptions, card: CheckpointCard) -> list[str]:
    spellings = [
        note
        for flag, given in ((ORIGINAL_FLAG, options.original_languages), (EXPANDED_FLAG, options.expanded_languages))
        for note in parse_languages(given, flag)[1]
    ]
    if options.adapter and not learned_languages(card.history):
        return [
            f"{ORIGINAL_FLAG} and {EXPANDED_FLAG} would record the languages of the adapter's experts; evaluation, "
            "review and expand need them"
        ]
    return spellings


def _adapter_base(options: ImportOptions, hf: Path) -> list[str]:
    """A note where the adapter names another base model: shapes would fit and the result would be wrong."""
    if not options.adapter:
        return []
    named = read_json(options.adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    base = find_base_model(hf, exported=False)
    if not isinstance(named, str) or named.rstrip("/").split("/")[-1].lower() in ("", base.directory.lower()):
        return []
    return [f"the adapter names {named} as its base, and --hf is {base.name or base.directory}; they must be one model"]


def _unread_fields(hf: Path, model: HFDirectory) -> list[str]:
    """Notes about fields of config.json that neither transformers nor the import reads."""
    config, rope = read_json(hf / CONFIG_FILE), model.architecture.rope
    notes = []
    unread = unread_rope_fields(config, rope)
    if unread:
        notes.append(
            f"config.json's {' and '.join(unread)} says otherwise: read, as transformers does, was {rope['rope_type']} "
            f"with rope_theta {rope['rope_theta']:g}; the export says so in every field"
        )
    code = [name for name in CODE_FIELDS if config.get(name)]
    if code:
        notes.append(
            f"config.json's {' and '.join(code)} names code that comes with the model; it is neither run nor exported: "
            f"the model is read as transformers' own {model.architecture.family.architecture}"
        )
    if model.is_moe and model.card and model.config != read_json(hf / SIDE_DIRECTORY / CONFIG_FILE):
        notes.append(
            "config.json is not as the export wrote it; it counts, as for transformers, not moe_lpr/config.json"
        )
    return notes


def _other_dtypes(model: HFDirectory, card: CheckpointCard) -> list[str]:
    dtype = getattr(torch, card.dtype)
    tensors = model.source().tensors
    other = [name for name, info in tensors.items() if len(info.shape) == 1 and info.dtype != dtype]
    if not other:
        return []
    return [
        f"{len(other)} norms and biases are stored in another dtype than the matrices' {card.dtype} and keep it, "
        f"{other[0]} for one; training computes with all weights in one dtype, as transformers does"
    ]


def _equal_experts(architecture: Architecture, card: CheckpointCard) -> list[str]:
    dense = sum(experts == 1 for experts in card.experts_per_layer)
    if not card.is_moe or not dense or architecture.mixture:
        return []
    itemsize = getattr(torch, card.dtype).itemsize
    # llama.cpp's forms have experts everywhere, in Mixtral's sizes.
    extra = equal_expert_bytes(architecture, card.experts_per_layer, MOE_LAYOUTS["mixtral"], itemsize)
    stock = MOE_LAYOUTS[architecture.family.moe_model_type]
    what = architecture.family.moe_architecture if stock.experts_everywhere else "llama.cpp's form"
    return [
        f"{what} has experts in every layer: an export writes each of the {dense} dense layers as {card.num_experts} "
        f"equal experts, which computes the same and takes {extra:,} bytes more"
    ]
