"""Sets of tensors that are not a model's plain weights: recognised by their names and dtypes, with the way out."""

from collections.abc import Mapping

import torch

from megatron_moe_lpr.checkpoint.format.reader import TensorInfo
from megatron_moe_lpr.model.configuration.quantisation import QUANTISED, WAY_OUT

FLOATS_OF_8_BITS = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)
# The first method fits of which all parts occur in names of tensors.
QUANTISED_PARTS = (
    ("GPTQ", (".qweight", ".g_idx")),
    ("AWQ or GPTQ", (".qweight",)),
    ("compressed-tensors", (".weight_packed",)),
    ("bitsandbytes, 4 bits", (".absmax", ".quant_map")),
    ("bitsandbytes, 8 bits", (".SCB",)),
    ("FP8", (".weight_scale_inv",)),
    ("FP8 or int8 with scales", (".weight_scale",)),
    ("MLX", (".scales", ".biases")),
    ("MXFP4", ("_blocks", "_scales")),
    ("HQQ", (".W_q",)),
    ("AQLM", (".codebooks",)),
    ("quanto", ("._data", "._scale")),
    ("EETQ", (".weight_scales",)),
    ("with scales", (".scales",)),
)
ADAPTER_PARTS = (".lora_A.", ".lora_embedding_A.", ".lora_magnitude_vector", ".base_layer.", ".modules_to_save.")
WRAPPERS = {
    "module.": "DistributedDataParallel's wrapper",
    "_orig_mod.": "torch.compile's wrapper",
    "_fsdp_wrapped_module.": "FSDP's wrapper",
    "base_model.model.": "peft's wrapper",
}
FOREIGN_STARTS = {
    "tok_embeddings.": "the maker's own form; download the Hugging Face form, or convert it with transformers",
    "transformer.h.": "another architecture's; config.json does not belong to these weights",
    "blk.": "llama.cpp's; give the Hugging Face form",
    "decoder.layers.": "Megatron's; give the Hugging Face form",
    "model.language_model.": "of a model that sees images too; such models are not supported",
    "language_model.": "of a model that sees images too; such models are not supported",
}


def foreign_form(tensors: Mapping[str, TensorInfo]) -> str | None:
    """What these tensors are instead of a model's plain weights, with the way out; None: nothing known."""
    return _quantised(tensors) or _fused(tensors) or _adapter(tensors) or _other_names(tensors)


def _quantised(tensors: Mapping[str, TensorInfo]) -> str | None:
    text = "\n".join(f"{name}." for name in tensors)
    for method, parts in QUANTISED_PARTS:
        if all(f"{part}." in text for part in parts):
            example = next(name for name in tensors if f"{parts[0]}." in f"{name}.")
            return f"{QUANTISED} ({method}, as {example} shows); {WAY_OUT}"
    for name, info in tensors.items():
        if (
            name.endswith(".weight")
            and len(info.shape) > 1
            and (info.dtype in FLOATS_OF_8_BITS or not info.dtype.is_floating_point)
        ):
            kind = str(info.dtype).removeprefix("torch.")
            return f"{QUANTISED} ({name} is stored as {kind}); {WAY_OUT}"
    return None


def _fused(tensors: Mapping[str, TensorInfo]) -> str | None:
    for name, info in tensors.items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")) and len(info.shape) == 3:
            return (
                f"{name} holds all experts in one tensor, as transformers 5 has them in memory; save the model with "
                "save_pretrained(DIR, save_original_format=True), its default, which writes a tensor for each expert"
            )
    return None


def _adapter(tensors: Mapping[str, TensorInfo]) -> str | None:
    for name in tensors:
        if any(part in name for part in ADAPTER_PARTS):
            return f"{name} is an adapter's that was not merged; save the model after peft's merge_and_unload()"
    return None


def _other_names(tensors: Mapping[str, TensorInfo]) -> str | None:
    for start, wrapper in WRAPPERS.items():
        if tensors and all(name.startswith(start) for name in tensors):
            return f"all names begin with {start}, {wrapper}; save the model inside it, without that beginning"
    for start, whose in FOREIGN_STARTS.items():
        name = next((name for name in tensors if name.startswith(start)), None)
        if name:
            return f"the names are {whose} (as {name})"
    if "embed_tokens.weight" in tensors and "model.embed_tokens.weight" not in tensors:
        return (
            "the names lack `model.`: saved was the class without its output layer (AutoModel); save the model loaded "
            "by AutoModelForCausalLM"
        )
    return None
