"""Merge indexed datasets of one language and tokenizer, such as the partitions of a preprocessing run."""

import dataclasses
import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_moe_lpr.data.indexed import IndexedWriter, check_index, shuffle_documents
from megatron_moe_lpr.data.manifest import (
    Manifest,
    Source,
    bin_path,
    check_agreement,
    loss_mask_path,
    read_manifest,
    strip_suffix,
    verify_index,
)
from megatron_moe_lpr.data.preparation.output_lock import output_lock
from megatron_moe_lpr.data.preparation.publishing import partial_directory, publish, refuse_existing
from megatron_moe_lpr.errors import UserError, name_file_in_oserror
from megatron_moe_lpr.files.atomic_file import is_same_file
from megatron_moe_lpr.progress import ProgressReport

_MUST_AGREE = ("language", "tokenizer", "eod", "append_eod", "dtype", "vocab_size", "chat", "chat_template")


def merge(
    inputs: Sequence[str],
    output_prefix: str,
    shuffle_seed: int | None = None,
    overwrite: bool = False,
    allow_missing_partitions: bool = False,
) -> Manifest:
    """Write one dataset that holds the documents of all inputs.

    Partitions of one run are merged in the order of their numbers; with the same `shuffle_seed` the result equals that
    of one unpartitioned run byte for byte. Other datasets are merged in the order given.

    Raises:
        UserError: inputs of two languages or tokenizers, missing partitions, or an output that exists.
    """
    prefixes = expand_prefixes(inputs)
    manifests = {prefix: read_manifest(prefix) for prefix in prefixes}
    for prefix, manifest in manifests.items():
        verify_index(prefix, manifest)
        for path in (bin_path(prefix), *((loss_mask_path(prefix),) if manifest.chat else ())):
            with open(path, "rb"):
                pass
        check_index(prefix, manifest.dtype, manifest.tokens)
    check_agreement(manifests, _MUST_AGREE)
    prefixes = _in_partition_order(manifests, allow_missing_partitions)
    if any(is_same_file(bin_path(prefix), bin_path(output_prefix)) for prefix in prefixes):
        raise UserError(f"--output-prefix {output_prefix}: is an input too")
    with output_lock(output_prefix), name_file_in_oserror(output_prefix):
        refuse_existing(output_prefix, overwrite)
        manifest = _merged([manifests[prefix] for prefix in prefixes], shuffle_seed)
        return _write(prefixes, manifests, manifest, output_prefix, overwrite)


def _write(
    prefixes: Sequence[str], manifests: dict[str, Manifest], manifest: Manifest, output_prefix: str, overwrite: bool
) -> Manifest:
    dtype, shuffle_seed = np.dtype(manifest.dtype), manifest.shuffle_seed
    with partial_directory(output_prefix) as directory:
        merged = str(directory / "merged")
        with (
            IndexedWriter(merged, dtype, manifest.chat) as writer,
            ProgressReport("merging", _gigabytes(manifests)) as progress,
        ):
            for prefix in prefixes:
                writer.append_dataset(prefix)
                progress.advance(manifests[prefix].bin_bytes / 1e9, {"tokens": manifests[prefix].tokens})
            writer.finish()
        checksum, mask_checksum = writer.checksum, writer.loss_mask_checksum
        if shuffle_seed is not None:
            checksum, mask_checksum = shuffle_documents(merged, f"{merged}.shuffled", dtype, shuffle_seed)
            bin_path(merged).unlink()
            merged = f"{merged}.shuffled"
        refuse_existing(output_prefix, overwrite)
        manifest = dataclasses.replace(manifest, bin_xxh3_128=checksum, loss_mask_xxh3_128=mask_checksum)
        return publish(merged, output_prefix, manifest)


def expand_prefixes(inputs: Sequence[str]) -> list[str]:
    """Return dataset prefixes; a glob is matched against existing manifests."""
    prefixes: list[str] = []
    for pattern in map(strip_suffix, inputs):
        is_name = not glob.has_magic(pattern) or Path(f"{pattern}.json").exists()
        matches = [pattern] if is_name else sorted(glob.glob(f"{pattern}.json"))
        if not matches:
            raise UserError(f"--input {pattern}: no dataset of that name ({pattern}.json)")
        prefixes += map(strip_suffix, matches)
    for prefix in prefixes:
        if prefixes.count(prefix) > 1:
            raise UserError(f"--input {prefix}: given twice")
    return prefixes


def _in_partition_order(manifests: dict[str, Manifest], allow_missing: bool) -> list[str]:
    partitions = {prefix: manifest.partition for prefix, manifest in manifests.items() if manifest.partition}
    if not partitions:
        return list(manifests)
    whole = [prefix for prefix in manifests if prefix not in partitions]
    if whole:
        raise UserError(f"{whole[0]}: not a partition, but other inputs are; merge the partitions first")
    numbers = {prefix: tuple(map(int, partition.split("/"))) for prefix, partition in partitions.items()}
    counts = {count for _, count in numbers.values()}
    if len(counts) > 1 or len(set(numbers.values())) < len(numbers):
        raise UserError(f"--input: partitions of different runs: {', '.join(partitions.values())}")
    count = counts.pop()
    missing = set(range(1, count + 1)) - {index for index, _ in numbers.values()}
    if missing and not allow_missing:
        names = ", ".join(f"{index}/{count}" for index in sorted(missing))
        raise UserError(f"--input: partition {names} is missing; --allow-missing-partitions merges without")
    return sorted(manifests, key=numbers.__getitem__)


def _merged(manifests: list[Manifest], shuffle_seed: int | None) -> Manifest:
    sources: dict[str, Source] = {source.name: source for manifest in manifests for source in manifest.sources}
    skipped = sum((Counter(manifest.skipped) for manifest in manifests), Counter())
    largest = [manifest.largest_token for manifest in manifests if manifest.largest_token is not None]
    counted = [manifest.loss_text_bytes for manifest in manifests if manifest.loss_text_bytes is not None]
    return dataclasses.replace(
        manifests[0],
        documents=sum(manifest.documents for manifest in manifests),
        tokens=sum(manifest.tokens for manifest in manifests),
        text_bytes=sum(manifest.text_bytes for manifest in manifests),
        skipped=dict(sorted(skipped.items())),
        sources=list(sources.values()),
        largest_token=max(largest) if len(largest) == len(manifests) else None,
        loss_tokens=sum(manifest.loss_tokens or 0 for manifest in manifests) if manifests[0].chat else None,
        loss_text_bytes=sum(counted) if len(counted) == len(manifests) else None,
        partition=None,
        shuffle_seed=shuffle_seed,
    )


def _gigabytes(manifests: dict[str, Manifest]) -> float:
    return sum(manifest.bin_bytes for manifest in manifests.values()) / 1e9
