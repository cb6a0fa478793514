"""A Hugging Face directory made once from a GGUF file, in the cache that programs of Hugging Face share."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_moe_lpr.conversion.hugging_face.gguf_metadata import ROPE_FREQUENCIES, Metadata, hf_config
from megatron_moe_lpr.conversion.hugging_face.gguf_record import RECORD_FILE, GGUFRecord
from megatron_moe_lpr.conversion.hugging_face.gguf_tokenizer import write_tokenizer
from megatron_moe_lpr.conversion.hugging_face.gguf_weights import GGUFWeights
from megatron_moe_lpr.conversion.hugging_face.safetensors_writer import TensorSpec, write_safetensors
from megatron_moe_lpr.files.atomic_directory import atomic_directory
from megatron_moe_lpr.files.checksums import sha256_of_file
from megatron_moe_lpr.files.json_files import write_json
from megatron_moe_lpr.model.tensors import EMBEDDING_NAME, OUTPUT_NAME
from megatron_moe_lpr.progress import ProgressReport

SHARD_BYTES = 5 * 10**9


def dequantised_directory(path: Path) -> Path:
    """Return the Hugging Face directory of a GGUF file, which is written on first use.

    It lies below HF_HOME under the file's name and SHA-256, needs 2 bytes a parameter (4 where the file holds float32),
    and is written one tensor at a time.

    Raises:
        UserError: the file is damaged, or not of a dense family that is read.
        OSError: the disk is full; nothing is left.
    """
    from huggingface_hub import constants

    digest = sha256_of_file(path)
    target = Path(constants.HF_HOME) / "moe-lpr" / "gguf" / f"{path.stem}-{digest[:16]}"
    if not (target / RECORD_FILE).is_file():
        weights = GGUFWeights(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(target, overwrite=True, last=(RECORD_FILE,)) as partial:
            write_directory(weights, digest, partial)
    return target


def write_directory(weights: GGUFWeights, digest: str, directory: Path) -> None:
    """Write configuration, tokenizer, weights and record into an existing directory."""
    specs = weights.specs()
    shapes = {spec.name: spec.shape for spec in specs}
    divisors = weights.values(ROPE_FREQUENCIES) if ROPE_FREQUENCIES in weights.tensors else None
    config = hf_config(weights.metadata, shapes[EMBEDDING_NAME][0], OUTPUT_NAME not in shapes, divisors)
    dtype = str(weights.matrix_dtype).removeprefix("torch.")
    write_json({**config, "torch_dtype": dtype}, directory / "config.json")
    write_tokenizer(weights.metadata, directory)
    _write_settings(weights.metadata, config, directory)
    with ProgressReport("dequantising", sum(spec.num_bytes for spec in specs)) as progress:

        def read(spec: TensorSpec) -> Any:
            tensor = weights.read(spec)
            progress.advance(spec.num_bytes, {"MB": spec.num_bytes / 1e6})
            return tensor

        write_safetensors(directory, specs, read, SHARD_BYTES)
    record = GGUFRecord(weights.path.name, digest, dict(weights.kinds))
    write_json(dataclasses.asdict(record), directory / RECORD_FILE)


def _write_settings(metadata: Metadata, config: dict[str, Any], directory: Path) -> None:
    """Write generation_config.json, and a README.md with the licence where the file names one."""
    ends: dict[str, Any] = {name: config[name] for name in ("bos_token_id", "eos_token_id") if name in config}
    if ends:
        write_json(ends, directory / "generation_config.json")
    if licence := metadata.fields.get("general.license"):
        (directory / "README.md").write_text(f"---\nlicense: {json.dumps(licence)}\n---\n", encoding="utf-8")
