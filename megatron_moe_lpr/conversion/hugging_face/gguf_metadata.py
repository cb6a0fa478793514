"""The metadata of a GGUF file: the model's configuration in Hugging Face's fields."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.architecture import FAMILIES

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""GGUF's names of architectures that are read; they are the families' own. Mistral's models are `llama` there."""
FIELDS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
ROPE_FREQUENCIES = "rope_freqs.weight"
"""Name of the tensor that divides each frequency of Llama 3.1's rotary embedding."""
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Llama 3.1, 3.2 and 3.3 have in common; a GGUF file keeps the resulting divisors alone."""
REMEDY = "give the Hugging Face directory of the model that it was made of"


class Metadata:
    """Metadata fields of one file, by name, with errors that name both."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path, self.fields = path, fields

    @property
    def architecture(self) -> str:
        """GGUF's name of the architecture. Raises UserError if it is not one of `ARCHITECTURES`."""
        name = self.fields.get("general.architecture")
        if name not in ARCHITECTURES:
            raise UserError(
                f"{self.path}: architecture {name}; GGUF files of {', '.join(ARCHITECTURES)} are read; {REMEDY}"
            )
        return str(name)

    def get(self, name: str, default: Any = None) -> Any:
        """A field of the architecture, for example `block_count`."""
        return self.fields.get(f"{self.architecture}.{name}", default)

    def require(self, name: str, default: int | None = None) -> int:
        """An integer field of the architecture. Raises UserError if it is missing, or differs between layers."""
        value = self.get(name, default)
        if not isinstance(value, int):
            raise UserError(f"{self.path}: metadata {self.architecture}.{name} is {value}; a whole number is expected")
        return value

    def require_float(self, name: str) -> float:
        """A field of the architecture that llama.cpp too reads no file without. Raises UserError if it is missing."""
        value = self.get(name)
        if not isinstance(value, float):
            raise UserError(f"{self.path}: metadata {self.architecture}.{name} is {value}; a number is expected")
        return value


def hf_config(metadata: Metadata, vocab_size: int, tied: bool, divisors: np.ndarray | None) -> dict[str, Any]:
    """Return the `config.json` of a file.

    Args:
        vocab_size: rows of the embedding.
        tied: the file has no output layer.
        divisors: [head dimension / 2], of `ROPE_FREQUENCIES`; None: the file has none.

    Raises:
        UserError: the architecture, or its rotary embedding, is not one that is read.
    """
    family = FAMILIES[metadata.architecture]
    fields = {theirs: metadata.require(ours) for ours, theirs in FIELDS.items()}
    heads = fields["num_attention_heads"]
    head_dim = metadata.get("attention.key_length") or fields["hidden_size"] // heads
    theta = _shortest(metadata.get("rope.freq_base", 10000.0))
    _refuse_other_positions(metadata, head_dim)
    special = {f"{name}_token_id": metadata.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    config = {
        "architectures": [family.architecture],
        "model_type": family.name,
        **fields,
        "num_key_value_heads": metadata.require("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _shortest(metadata.require_float("attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "tie_word_embeddings": tied,
        "vocab_size": vocab_size,
        **{name: number for name, number in special.items() if number is not None},
    }
    if divisors is not None:
        config["rope_scaling"] = _llama3_rope(metadata.path, divisors, theta, head_dim)
    return config


def _shortest(number: float) -> float:
    """The shortest decimal that rounds to the float32 in the file, which is what its maker wrote (1e-05)."""
    return float(str(np.float32(number)))


def _refuse_other_positions(metadata: Metadata, head_dim: int) -> None:
    scaling = metadata.get("rope.scaling.type", "none")
    if scaling != "none":
        raise UserError(
            f"{metadata.path}: positions scaled by {scaling} ({metadata.architecture}.rope.scaling.type) are not read; "
            f"{REMEDY}"
        )
    plain = {"rope.dimension_count": head_dim, "attention.sliding_window": 0}
    # llama.cpp scales linearly by either where the file names no type of scaling.
    plain |= {"rope.scaling.factor": 1, "rope.scale_linear": 1}
    for name, expected in plain.items():
        value = metadata.get(name, expected)
        if value != expected:
            raise UserError(
                f"{metadata.path}: {metadata.architecture}.{name} is {value}, and only {expected} is read; {REMEDY}"
            )


def _llama3_rope(path: Path, divisors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """Find the parameters of Llama 3.1's rotary embedding from its divisors, and check that they give these.

    The largest divisor is the factor of the lowest frequencies; between both bounds a frequency is interpolated
    (transformers' modeling_rope_utils.py `_compute_llama3_parameters`).
    """
    factor = float(divisors.max())
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = LLAMA3_ROPE["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise UserError(f"{path}: its {ROPE_FREQUENCIES} is not that of Llama 3.1, 3.2 or 3.3; {REMEDY}")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}
