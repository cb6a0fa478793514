"""Training samples: megatron-core's GPTDataset and BlendedDataset with a language tag on every token."""

import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import megatron.core
import numpy as np
import psutil
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_moe_lpr.data.indexed import open_loss_mask
from megatron_moe_lpr.data.reading.blend import BlendEntry
from megatron_moe_lpr.data.reading.config import DataConfig, DataSources, cache_directory
from megatron_moe_lpr.data.reading.counted_tokens import check_counted_tokens
from megatron_moe_lpr.data.reading.document_options import DocumentOptions
from megatron_moe_lpr.data.reading.documents import document_keys, mask_last_tokens, starts_in_sample
from megatron_moe_lpr.data.reading.index_cache import build_directory
from megatron_moe_lpr.data.reading.index_maps import are_intact, refuse_pickles
from megatron_moe_lpr.data.reading.packed_samples import PackedReader, packing_notes
from megatron_moe_lpr.data.reading.packing import PackedIndex, build_packed_index
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksum_file import write_checksums
from megatron_moe_lpr.megatron.overriding import override, overrides_megatron
from megatron_moe_lpr.parallel.first_rank import run_on_rank_0
from megatron_moe_lpr.platform.collectives import world_of_one

TrainingDataset: TypeAlias = BlendedDataset | torch.utils.data.ConcatDataset
"""Training data of a run; a ConcatDataset if the run was lengthened."""
SURPLUS = 0.005  # as in megatron-core: blending may draw slightly more than a dataset's exact fraction
BYTES_OF_A_SAMPLE = 22
"""Bytes of index maps per sample, at least: int16 + int64 of the blend, 2 x int32 + uint32 of the datasets."""
SHARED_FILE_SYSTEM_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class EndOfDocument:
    """The tokenizer interface that GPTDataset uses."""

    eod: int
    vocab_size: int

    @property
    def unique_identifiers(self) -> dict[str, int]:
        """Part of megatron-core's key of cached index maps."""
        return {"eod": self.eod}


@overrides_megatron
class TaggedGPTDataset(GPTDataset):
    """Packed samples of one dataset, each token tagged with the dataset's language.

    Args:
        entry: the dataset and its documents.
        language: number of the dataset's language.
        num_samples: minimum number of samples; documents repeat in epochs, each in another order.
        config: megatron-core's dataset configuration.
        documents_apart: whether its documents see each other.

    Attributes:
        reader: makes samples of whole documents; None: documents are concatenated, as by Megatron.
    """

    def __init__(
        self,
        entry: BlendEntry,
        language: int,
        num_samples: int,
        config: GPTDatasetConfig,
        documents_apart: DocumentOptions,
    ) -> None:
        self.language, self.documents_apart = language, documents_apart
        self.reader: PackedReader | None = None
        if entry.is_packed:
            length, eod = config.sequence_length, config.tokenizer.eod
            self.reader = PackedReader(entry, language, length, eod, config.eod_mask_loss, documents_apart)
        # Of conversations: which tokens count in the loss.
        self.counted = open_loss_mask(entry.prefix) if entry.manifest.chat else None
        self.token_bytes = np.dtype(entry.manifest.dtype).itemsize
        documents = np.arange(entry.first_document, entry.end_document, dtype=np.int32)
        # megatron-core uses the path as key of cached index maps. They depend on document lengths only, so this key
        # finds them for a dataset that was moved or preprocessed again.
        key = f"{entry.manifest.index_sha256}-{entry.first_document}-{entry.end_document}"
        key += "-best-fit" if entry.is_packed else ""
        super().__init__(IndexedDataset(entry.prefix), key, documents, num_samples, Split.train, config)

    @override
    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """Return `tokens`, `labels`, `position_ids`, `language` (int64) and `loss_mask` (float32), each [sequence];
        with --reset-attention-mask also `document` (int32)."""
        if self.reader is not None:
            return self.reader.read(self.packed_index.sample(idx or 0))
        sample = super().__getitem__(idx)
        if self.counted is not None:
            sample["loss_mask"] = sample["loss_mask"] * self._counted_labels(self.counted, idx or 0)
        if self.documents_apart.reset_attention_mask:
            sample |= self._documents(idx or 0, sample)
        return {**sample, "language": torch.full_like(sample["tokens"], self.language)}

    @override
    def __len__(self) -> int:
        return super().__len__() if self.reader is None else len(self.packed_index.order)

    @override
    def _build_document_sample_shuffle_indices(self) -> tuple:
        """Build or load the index maps: Megatron's, or those of best-fit packing, in the same directory."""
        if self.reader is None:
            return super()._build_document_sample_shuffle_indices()
        stem = f"{self.config.path_to_cache}/{self.unique_description_hash}-{type(self).__name__}"
        index = PackedIndex.load(stem)
        if index is None:
            lengths, seed = self.dataset.sequence_lengths, self.config.random_seed
            index = build_packed_index(lengths, self.indices, self.reader.capacity, seed, self.num_samples)
            index.save(stem)
        self.packed_index = index
        return None, None, None

    def _counted_labels(self, counted: np.ndarray, idx: int) -> torch.Tensor:
        """Return 1 for each label of a sample that counts in the loss, else 0, float32 [sequence]."""
        row = self.shuffle_index[idx]
        (first, offset), (last, end) = self.sample_index[row], self.sample_index[row + 1]
        parts = []
        for place in range(first, last + 1):
            document = self.document_index[place]
            begin = self.dataset.index.sequence_pointers[document] // self.token_bytes
            # The sample's last label lies behind its last token.
            length = end + 1 if place == last else self.dataset.index.sequence_lengths[document]
            parts.append(counted[begin + (offset if place == first else 0) : begin + length])
        return torch.from_numpy(np.concatenate(parts)[1:].astype(np.float32))

    def _documents(self, idx: int, sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The keys that keep a sample's documents apart, and the loss mask with --eod-mask-loss."""
        row = self.shuffle_index[idx]
        (first, offset), (last, _) = self.sample_index[row], self.sample_index[row + 1]
        lengths = self.dataset.sequence_lengths[self.document_index[first:last]]
        boundaries = np.cumsum(lengths, dtype=np.int64) - offset
        # An end of document may end each turn of a conversation.
        eod = self.config.tokenizer.eod if self.counted is None else None
        starts = starts_in_sample(boundaries, sample["tokens"], eod)
        keys = document_keys(starts, len(sample["tokens"]), self.documents_apart)
        if self.config.eod_mask_loss:
            keys["loss_mask"] = mask_last_tokens(sample["loss_mask"], starts)
        return keys


def build_training_dataset(
    sources: DataSources, config: DataConfig, sequence_length: int, train_samples: int
) -> BlendedDataset:
    """Build the blend of all training datasets; item i is a dict of tensors, see `TaggedGPTDataset`.

    Data, `--seed`, sequence length and `train_samples` determine the order. Rank 0 builds the index maps and caches
    them atomically with checksums; damaged ones are rebuilt. All ranks call this together (or one process without
    torch.distributed).

    Args:
        sources: the checked datasets of the run.
        config: the data flags.
        sequence_length: tokens per sample.
        train_samples: samples of the whole run, which is the length of the dataset.

    Raises:
        UserError: the index maps cannot be built, or other nodes do not see them.
    """
    _check_memory(train_samples)
    for entry in sources.train:
        check_counted_tokens(entry, sequence_length)
    counts = [math.ceil(math.ceil(entry.weight * train_samples) * (1 + SURPLUS)) + 1 for entry in sources.train]
    settings = _megatron_config(sources, config, sequence_length)
    documents = config.documents.apart(sources.is_packed)
    directory = cache_directory(config) / _cache_key(sources.train, settings, counts, train_samples)

    def build(path: Path) -> BlendedDataset:
        settings.path_to_cache = str(path)
        datasets = [
            TaggedGPTDataset(entry, sources.languages.id(entry.language), count, settings, documents)
            for entry, count in zip(sources.train, counts, strict=True)
        ]
        return BlendedDataset(datasets, [entry.weight for entry in sources.train], train_samples, settings)

    # Only megatron-core's builder is replaced: killed, it leaves half-written maps, and after an error all other ranks
    # wait in a barrier.
    _build_on_first_rank(directory, build)
    dataset = build(directory)
    if not dist.is_initialized() or dist.get_rank() == 0:
        for note in packing_notes([*sources.train, *sources.valid], sequence_length):
            print(f"note: {note}", file=sys.stderr)
    return dataset


def _check_memory(train_samples: int) -> None:
    needed, there = train_samples * BYTES_OF_A_SAMPLE, psutil.virtual_memory().total
    if needed > there:
        raise UserError(
            f"{train_samples:,} samples (--train-iters x --global-batch-size, or --train-samples): index maps take "
            f"{needed / 1e9:,.0f} GB or more, and this machine has {there / 1e9:,.0f} GB of memory; ask for fewer"
        )


def _megatron_config(sources: DataSources, config: DataConfig, sequence_length: int) -> GPTDatasetConfig:
    vocab_size = sources.train[0].manifest.vocab_size
    return GPTDatasetConfig(
        random_seed=config.seed,
        sequence_length=sequence_length,
        # Only marks the data as not mocked: the datasets get the entries directly.
        blend_per_split=[([entry.prefix for entry in sources.train], None), None, None],
        tokenizer=EndOfDocument(sources.eod, vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=config.eod_mask_loss,
        create_attention_mask=False,
    )


def _cache_key(
    blend: Sequence[BlendEntry], settings: GPTDatasetConfig, counts: Sequence[int], train_samples: int
) -> str:
    parts = [
        (entry.manifest.index_sha256, entry.first_document, entry.end_document, entry.weight)
        + (("best-fit",) if entry.is_packed else ())
        for entry in blend
    ]
    content = [
        megatron.core.__version__,
        settings.random_seed,
        settings.sequence_length,
        settings.tokenizer.eod,
        train_samples,
        list(counts),
        parts,
    ]
    return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()[:16]


def _build_on_first_rank(directory: Path, build) -> None:
    run_on_rank_0(lambda: _build_unless_intact(directory, build), f"building index maps in {directory}")
    deadline = time.monotonic() + SHARED_FILE_SYSTEM_SECONDS
    while not directory.is_dir():
        # On a network file system a new directory may become visible a few seconds late.
        if time.monotonic() > deadline:
            raise UserError(f"{directory}: rank 0 wrote no index maps there; is --data-cache-path shared by all nodes?")
        time.sleep(0.5)
    refuse_pickles(directory)


def _build_unless_intact(directory: Path, build) -> None:
    try:
        if are_intact(directory):
            return
        _check_helpers()
        # BlendedDataset queries torch.distributed for its rank before it writes.
        with build_directory(directory) as partial, world_of_one():
            build(partial)
            write_checksums(partial, {})
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"{directory}: the index maps cannot be written: {error.strerror or error}{place}; make room or get write "
            "permission there, or name a directory on another disk with --data-cache-path"
        ) from None


def _check_helpers() -> None:
    try:
        from megatron.core.datasets import helpers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"megatron-core's compiled data helpers are missing ({error}); install its wheel, or with a C++ compiler "
            "and pybind11 present: pip install --no-binary megatron-core megatron-core"
        ) from None
