"""Whether the files that all ranks write make up a checkpoint: unique names, every element of every tensor once."""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from megatron_moe_lpr.rehearsal.findings import Finding, Findings, list_ranks
from megatron_moe_lpr.rehearsal.record import RankRecord
from megatron_moe_lpr.rehearsal.shards import Shard

PHASE = "save"


def check_files(records: Sequence[RankRecord], shards: Sequence[Shard] = ()) -> list[Finding]:
    """Find files that two ranks write, and files whose bytes are not those of their tensors.

    Args:
        shards: what the ranks of `records` write into which file; empty: bytes are not compared.
    """
    findings = Findings(PHASE)
    writers: dict[str, list[int]] = {}
    for record in records:
        for path, _ in record.files:
            writers.setdefault(path, []).append(record.rank)
    for path, ranks in writers.items():
        if len(ranks) > 1:
            findings.add(("name", tuple(ranks)), f"file {path} is written more than once: by ranks {list_ranks(ranks)}")
    if shards:
        _check_bytes(records, shards, findings)
    return list(findings)


def _check_bytes(records: Sequence[RankRecord], shards: Sequence[Shard], findings: Findings) -> None:
    """Compare the bytes of files with those of their tensors; beside them there are objects and torch.save's own."""
    held: dict[tuple[int, str], list[int]] = {}
    for shard in shards:
        held.setdefault((shard.rank, shard.file), []).append(shard.bytes)
    written = {(record.rank, path): size for record in records for path, size in record.files}
    for (rank, path), parts in held.items():
        if (rank, path) not in written:
            findings.add(("lost", rank), f"rank {rank} writes no file {path}, which is to hold {len(parts):,} tensors")
        elif written[rank, path] < sum(parts):
            findings.add(
                ("short", rank),
                f"rank {rank} writes {written[rank, path]:,} bytes into {path}, whose tensors have {sum(parts):,}",
            )


def check_shards(written: Iterable[Shard], held: Iterable[Shard] = (), ranks_missing: bool = False) -> list[Finding]:
    """Find elements of tensors that no rank writes, or more than one.

    Args:
        written: what the ranks write, each rectangle with the rank that writes it.
        held: what ranks hold, copies too: tensors that nobody writes are found by these.
        ranks_missing: not all ranks are there: elements that none of them writes are no fault.
    """
    findings = Findings(PHASE)
    tensors: dict[str, list[Shard]] = {shard.key: [] for shard in held} if not ranks_missing else {}
    for shard in written:
        tensors.setdefault(shard.key, []).append(shard)
    for key, shards in tensors.items():
        if not shards:
            findings.add(("unwritten",), f"tensor {key} is written by no rank")
        elif _has_one_shape(key, shards, findings):
            overlaps = list(_overlaps(shards))
            for first, second in overlaps:
                _report_overlap(first, second, findings)
            if not (overlaps or ranks_missing):
                _check_whole(key, shards, findings)
    return list(findings)


def total_bytes(shards: Iterable[Shard]) -> int:
    """Bytes of the whole tensors of which these are parts, each tensor once."""
    whole = {shard.key: math.prod(shard.shape) * shard.element_bytes for shard in shards}
    return sum(whole.values())


def _has_one_shape(key: str, shards: Sequence[Shard], findings: Findings) -> bool:
    """Check that all ranks mean the same tensor and that their parts lie in it."""
    first = shards[0]
    for shard in shards:
        if (shard.shape, shard.element_bytes) != (first.shape, first.element_bytes):
            findings.add(
                ("shape",),
                f"tensor {key}: {_size(first)} on rank {first.rank}, {_size(shard)} on rank {shard.rank}",
            )
            return False
        ends = (offset + size for offset, size in zip(shard.offsets, shard.sizes, strict=True))
        if any(end > size for end, size in zip(ends, shard.shape, strict=True)) or min(shard.offsets, default=0) < 0:
            findings.add(("outside",), f"tensor {key} {_size(first)}: rank {shard.rank} writes {_place(shard)} of it")
            return False
    return True


def _overlaps(shards: Sequence[Shard]) -> Iterator[tuple[Shard, Shard]]:
    """Pairs of shards of a tensor that have elements in common."""
    if len(shards) < 2 or not shards[0].shape:
        yield from ((shards[0], other) for other in shards[1:])
        return
    ordered = sorted((shard for shard in shards if shard.bytes), key=lambda shard: shard.offsets)
    begins = np.array([shard.offsets for shard in ordered])
    ends = begins + np.array([shard.sizes for shard in ordered])
    for place, shard in enumerate(ordered):
        # Ordered by the first axis: behind the first that begins beyond this one's end none overlaps.
        last = np.searchsorted(begins[:, 0], ends[place, 0], side="left")
        others = slice(place + 1, last)
        common = np.all((begins[others] < ends[place]) & (ends[others] > begins[place]), axis=1)
        yield from ((shard, ordered[place + 1 + int(other)]) for other in np.flatnonzero(common))


def _report_overlap(first: Shard, second: Shard, findings: Findings) -> None:
    one, two = sorted((first, second), key=lambda shard: shard.rank)
    places = _place(one) if one.place == two.place else f"{_place(one)} and {_place(two)}"
    findings.add(
        ("overlap", one.rank, two.rank),
        f"tensor {one.key} {_size(one)}: ranks {one.rank} and {two.rank} write the same elements, {places}",
    )


def _check_whole(key: str, shards: Sequence[Shard], findings: Findings) -> None:
    """Check that shards that do not overlap make up their tensor."""
    there = sum(math.prod(shard.sizes) for shard in shards)
    whole = math.prod(shards[0].shape)
    if there != whole:
        ranks = sorted({shard.rank for shard in shards})
        findings.add(
            ("hole", tuple(ranks)),
            f"tensor {key} {_size(shards[0])}: {whole - there:,} of {whole:,} elements are written by no rank; ranks "
            f"{list_ranks(ranks)} write the others",
        )


def _size(shard: Shard) -> str:
    return f"[{', '.join(map(str, shard.shape))}] of {shard.element_bytes} bytes each"


def _place(shard: Shard) -> str:
    spans = (f"{offset}:{offset + size}" for offset, size in zip(shard.offsets, shard.sizes, strict=True))
    return f"[{', '.join(spans)}]"
