"""Inputs of all candidates: one model in both formats, and random tokens."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from megatron_moe_lpr.conversion.exporter import export_hf
from megatron_moe_lpr.conversion.import_options import ImportOptions
from megatron_moe_lpr.conversion.importer import import_hf
from megatron_moe_lpr.data.indexed import IndexedWriter
from megatron_moe_lpr.data.manifest import Manifest
from megatron_moe_lpr.data.preparation.publishing import publish


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The model and its batch."""

    hidden_size: int = 384
    num_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    intermediate_size: int = 1024
    vocab_size: int = 8192
    num_experts: int = 4
    seq_length: int = 256
    batch_size: int = 4

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.seq_length * self.batch_size


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Paths of one benchmark."""

    checkpoint: Path
    """Checkpoint of the upcycled model."""
    dense: Path
    """Checkpoint of the dense model."""
    moe_hf: Path
    """The upcycled model as a stock Qwen2-MoE."""
    dense_hf: Path
    expanded: str
    """Dataset prefix of an expanded language."""
    original: str
    """Dataset prefix of an original language."""


def make_inputs(root: Path, sizes: Sizes) -> Inputs:
    """Write models and data below `root`."""
    dense_hf = root / "dense-hf"
    _write_dense(dense_hf, sizes)
    import_hf(ImportOptions(hf=dense_hf, num_experts=sizes.num_experts), root / "moe")
    import_hf(ImportOptions(hf=dense_hf, num_experts=1), root / "dense")
    export_hf(root / "moe", root / "moe-hf", 1 << 30)
    expanded, original = (_write_data(root / name, name, sizes) for name in ("el", "en"))
    return Inputs(root / "moe", root / "dense", root / "moe-hf", dense_hf, expanded, original)


def _write_dense(directory: Path, sizes: Sizes) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1234)
    config = Qwen2Config(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        max_position_embeddings=sizes.seq_length,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)


def _write_data(prefix: Path, language: str, sizes: Sizes) -> str:
    documents, length = 200, sizes.seq_length
    tokens = np.random.default_rng(7).integers(0, sizes.vocab_size, documents * length, np.int32)
    partial = str(prefix.parent / f"partial-{prefix.name}")
    with IndexedWriter(partial, np.dtype(np.int32)) as writer:
        writer.append(tokens, np.full(documents, length, np.int32))
        writer.finish()
    manifest = Manifest(
        language=language,
        tokenizer="random",
        vocab_size=sizes.vocab_size,
        eod=0,
        append_eod=False,
        dtype="int32",
        documents=documents,
        tokens=len(tokens),
        text_bytes=len(tokens),
        bin_bytes=0,
        idx_bytes=0,
        index_sha256="",
        skipped={},
        sources=[],
    )
    publish(partial, str(prefix), manifest)
    return str(prefix)
