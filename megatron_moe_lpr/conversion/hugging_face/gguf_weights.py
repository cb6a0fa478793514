"""The weights of a GGUF file under Hugging Face's names, dequantised one tensor at a time."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_moe_lpr.conversion.hugging_face.gguf_metadata import ROPE_FREQUENCIES, Metadata
from megatron_moe_lpr.conversion.hugging_face.gguf_record import UNQUANTISED
from megatron_moe_lpr.conversion.hugging_face.safetensors_writer import TensorSpec
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.tensors import EMBEDDING_NAME, OUTPUT_NAME

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Modules of a layer: GGUF's name and Hugging Face's."""
OUTSIDE = {"token_embd.weight": EMBEDDING_NAME, "output_norm.weight": "model.norm.weight", "output.weight": OUTPUT_NAME}
LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
DTYPES = dict(zip(UNQUANTISED, (torch.float32, torch.float16, torch.bfloat16), strict=True))


class GGUFWeights:
    """The tensors of a GGUF file of one dense model."""

    def __init__(self, path: Path) -> None:
        """Read the file's headers.

        Raises:
            UserError: the package gguf is missing, or the file is damaged, split, or of another architecture.
        """
        self.path = path
        with _damage_is_an_error(path):
            reader = _open(path)
            self.metadata = Metadata(path, {name: field.contents() for name, field in reader.fields.items()})
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        if self.metadata.fields.get("split.count", 1) > 1:
            raise UserError(f"{path}: one part of a split model; join the parts with `llama-gguf-split --merge`")
        _ = self.metadata.architecture  # raises for one that is not read, before its tensors are named
        self.names = {hf_name(name, path): name for name in self.tensors if name != ROPE_FREQUENCIES}
        if EMBEDDING_NAME not in self.names:
            raise UserError(f"{path}: no token_embd.weight in it; copy the file again")

    @property
    def kinds(self) -> Counter[str]:
        """Number of tensors of each of GGUF's types, for example Q4_K."""
        return Counter(tensor.tensor_type.name for tensor in self.tensors.values())

    @property
    def matrix_dtype(self) -> torch.dtype:
        """The dtype that all matrices get: their own, or bfloat16 where one is quantised or they differ.

        bfloat16 rounds by 1 in 512, a quantisation to 4 bits by some 1 in 30.
        """
        kinds = {tensor.tensor_type.name for tensor in self.tensors.values() if len(tensor.shape) > 1}
        return DTYPES.get(kinds.pop(), torch.bfloat16) if len(kinds) == 1 else torch.bfloat16

    def specs(self) -> list[TensorSpec]:
        """Return names, shapes and dtypes under Hugging Face's names; norms and biases stay float32."""
        return [
            TensorSpec(name, shape, self.matrix_dtype if len(shape) > 1 else torch.float32)
            for name, shape in ((name, _shape(self.tensors[theirs])) for name, theirs in self.names.items())
        ]

    def read(self, spec: TensorSpec) -> torch.Tensor:
        """Dequantise a tensor. Raises UserError if the file's data are damaged."""
        values = self.values(self.names[spec.name])
        if self.metadata.architecture == "llama" and spec.name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _halves_apart(values, self._heads(spec.name))
        return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(spec.dtype)

    def values(self, name: str) -> np.ndarray:
        """The float32 values of a tensor by GGUF's name."""
        from gguf import dequantize

        tensor = self.tensors[name]
        with _damage_is_an_error(self.path):
            return dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(_shape(tensor))

    def _heads(self, name: str) -> int:
        heads = self.metadata.require("attention.head_count")
        return heads if "q_proj" in name else self.metadata.require("attention.head_count_kv", heads)


def hf_name(name: str, path: Path) -> str:
    """Return Hugging Face's name of a tensor. Raises UserError for one that no dense family has."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    found = LAYER.fullmatch(name)
    if found is None or found[2] not in MODULES:
        raise UserError(f"{path}: the tensor {name} has no place in a dense model of this architecture")
    return f"model.layers.{found[1]}.{MODULES[found[2]]}.{found[3]}"


def _shape(tensor: "ReaderTensor") -> tuple[int, ...]:
    """Shape in torch's order; GGUF counts from the dimension that lies closest."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _halves_apart(values: np.ndarray, heads: int) -> np.ndarray:
    """Undo the order of rows that llama.cpp wants for its rotary embedding: pairs side by side in each head."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _open(path: Path) -> "GGUFReader":
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"{path}: reading GGUF needs the package gguf: pip install 'megatron-moe-lpr[gguf]'") from None
    return GGUFReader(path)


@contextlib.contextmanager
def _damage_is_an_error(path: Path) -> Iterator[Any]:
    """Turn the many errors of the package gguf about a damaged file into one that names it."""
    try:
        yield
    except (UserError, OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a whole GGUF file ({what}); copy it again") from None
