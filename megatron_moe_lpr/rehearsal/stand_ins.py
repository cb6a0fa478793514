"""Files that stand in for a checkpoint and for datasets that are not there yet: of the right sizes, without content."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard
from megatron_moe_lpr.checkpoint.format.directory import CARD_FILE, CONFIG_FILE, RELEASE, SIDE_DIRECTORY, write_latest
from megatron_moe_lpr.checkpoint.format.reader import TensorInfo
from megatron_moe_lpr.checkpoint.format.writer import CheckpointWriter
from megatron_moe_lpr.checkpoint.saving.shard_writer import BLOB_BYTES
from megatron_moe_lpr.data.indexed import IndexedWriter
from megatron_moe_lpr.data.language_names import canonical_language, is_known
from megatron_moe_lpr.data.manifest import Manifest
from megatron_moe_lpr.data.preparation.publishing import publish
from megatron_moe_lpr.data.reading.config import DataConfig
from megatron_moe_lpr.files.json_files import write_json
from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.tensors import DENSE_LAYOUT, model_rows

TENSOR_FILE = "__0_0.distcp"
DOCUMENTS = 64
FINGERPRINT = "sha256:stand-in"


def write_checkpoint(root: Path, shape: ModelShape, config: Mapping[str, Any], dtype: str) -> None:
    """Write a checkpoint as `import` would of a model of this shape: index, card and config.json; the file of its
    tensors has their size and takes no room on the disk.

    Args:
        config: the dense model's config.json.
        dtype: torch's name of the dense model's dtype.
    """
    iteration = root / RELEASE
    rows = model_rows(shape.architecture, shape.experts_per_layer, DENSE_LAYOUT, shape.expansions, shape.new_tokens)
    dtypes = {True: torch.float32, False: getattr(torch, dtype)}
    with CheckpointWriter(iteration, {"iteration": 0}) as writer:
        sizes = {row.key: TensorInfo(tuple(row.shape), dtypes[row.kind.is_router]) for row in rows}
        writer.tensors, writer.places = write_sizes(iteration, sizes)
    (iteration / SIDE_DIRECTORY).mkdir()
    write_json(dict(config), iteration / SIDE_DIRECTORY / CONFIG_FILE)
    _card(shape, dtype).write(iteration / SIDE_DIRECTORY / CARD_FILE)
    write_latest(root, None)


def write_sizes(
    directory: Path, sizes: Mapping[str, TensorInfo]
) -> tuple[dict[str, STORAGE_TYPES], dict[MetadataIndex, _StorageInfo]]:
    """Write a file that is as large as these tensors and takes no room on the disk.

    Returns:
        The index of the tensors in it: their properties by key, and their places.
    """
    tensors: dict[str, STORAGE_TYPES] = {}
    places, end = {}, 0
    for key, info in sizes.items():
        size, offsets = torch.Size(info.shape), torch.Size([0] * len(info.shape))
        chunks = [ChunkStorageMetadata(offsets, size)]
        tensors[key] = TensorStorageMetadata(TensorProperties(dtype=info.dtype), size, chunks)
        length = math.prod(info.shape) * info.dtype.itemsize + BLOB_BYTES
        places[MetadataIndex(key, offsets, 0)] = _StorageInfo(TENSOR_FILE, end, length)
        end += length
    with open(directory / TENSOR_FILE, "wb") as file:
        file.truncate(end)
    return tensors, places


def _card(shape: ModelShape, dtype: str) -> CheckpointCard:
    return CheckpointCard(
        family=shape.architecture.family.name,
        experts_per_layer=list(shape.experts_per_layer),
        top_k=shape.top_k,
        dtype=dtype,
        original_fingerprint=FINGERPRINT,
        expansions=[list(layer) for layer in shape.expansions],
        openness=shape.newest_weight,
        inserted_blocks=list(shape.inserted_blocks),
        new_tokens=list(shape.new_tokens),
    )


def with_datasets(config: DataConfig, directory: Path, vocab_size: int, seq_length: int) -> DataConfig:
    """Return the flags of the data with small datasets in the place of all that are named, of the same languages as far
    as the names end in a language: `train-el` in Greek.

    Args:
        vocab_size: token ids of the datasets are below it.
        seq_length: tokens of a document.
    """
    written: dict[str, str] = {}

    def replaced(word: str) -> str:
        if _is_number(word):
            return word
        if word not in written:
            prefix, language = directory / f"data{len(written)}", word.rpartition("-")[2].rpartition("/")[2]
            known = canonical_language(language) if is_known(language) else "el"
            write_dataset(prefix, known, vocab_size, seq_length)
            written[word] = str(prefix)
        return written[word]

    return dataclasses.replace(
        config,
        data_path=[replaced(word) for word in config.data_path],
        valid_data_path=[replaced(word) for word in config.valid_data_path],
    )


def write_dataset(prefix: Path, language: str, vocab_size: int, seq_length: int) -> None:
    """Write an indexed dataset of `DOCUMENTS` documents, each of `seq_length` tokens that are drawn evenly."""
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
    tokens = np.random.default_rng(0).integers(0, vocab_size, DOCUMENTS * seq_length).astype(dtype)
    partial = f"{prefix}.partial"
    with IndexedWriter(partial, dtype) as writer:
        writer.append(tokens, np.full(DOCUMENTS, seq_length, np.int32))
        writer.finish()
    manifest = Manifest(
        language=language,
        tokenizer=FINGERPRINT,
        vocab_size=vocab_size,
        eod=0,
        append_eod=False,
        dtype=str(dtype),
        documents=DOCUMENTS,
        tokens=len(tokens),
        text_bytes=4 * len(tokens),
        bin_bytes=0,
        idx_bytes=0,
        index_sha256="",
        skipped={},
        sources=[],
        bin_xxh3_128=writer.checksum,
        largest_token=int(tokens.max()),
    )
    publish(partial, str(prefix), manifest)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def missing_data(config: DataConfig) -> Sequence[str]:
    """Names of datasets whose manifest is not there."""
    words = [*config.data_path, *config.valid_data_path]
    return [word for word in words if not _is_number(word) and not Path(f"{word}.json").is_file()]
