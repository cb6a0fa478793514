"""Whether every rank reads its share of the data: together the global batch, no sample twice, equal on all ranks that
hold parts of one copy of the model.

Equal are the samples of ranks that differ in their TP or PP coordinate only. The ranks of an expert-parallel group
read what their data-parallel ranks say: experts are shared over ranks that have different samples.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from megatron_moe_lpr.data.reading.batches import rank_samples
from megatron_moe_lpr.parallel.micro_batches import num_microbatches
from megatron_moe_lpr.rehearsal.findings import Finding, Findings, list_ranks
from megatron_moe_lpr.rehearsal.record import Phase, RankRecord
from megatron_moe_lpr.rehearsal.symmetry import World

Samples: TypeAlias = Sequence[Sequence[int]]
"""Numbers of samples, micro-batch by micro-batch."""


@dataclasses.dataclass(frozen=True)
class GlobalBatch:
    """One step's samples."""

    global_batch_size: int
    micro_batch_size: int
    consumed_samples: int = 0
    """Samples of the steps before."""

    @property
    def samples(self) -> range:
        """The numbers of the samples that all ranks read together."""
        return range(self.consumed_samples, self.consumed_samples + self.global_batch_size)

    def share(self, data_parallel_rank: int, data_parallel_size: int) -> Samples:
        """What one data-parallel rank reads, by the sampler of a training run.

        Raises:
            UserError: the global batch does not divide.
        """
        count = num_microbatches(self.global_batch_size, self.micro_batch_size, data_parallel_size)
        end = self.samples.stop
        place = (self.micro_batch_size, data_parallel_rank, data_parallel_size)
        return list(rank_samples(end, self.consumed_samples, *place))[:count]


def all_shares(world: World, batch: GlobalBatch) -> dict[int, Samples]:
    """What each rank of a world reads in a step, by the sampler of a training run.

    Raises:
        UserError: the world or the global batch does not divide.
    """
    world.layout.check_world(world.size)
    size = world.layout.data_parallel_size(world.size)
    shares = [batch.share(rank, size) for rank in range(size)]
    return {rank: shares[world.data_parallel_rank(rank)] for rank in range(world.size)}


def check_data_shares(
    records: Sequence[RankRecord], world: World, batch: GlobalBatch, phase: Phase = "step"
) -> list[Finding]:
    """Find ranks that do not read their share of a step's samples.

    Args:
        records: of all ranks, or of a sample; what ranks read that were not rehearsed is taken from the sampler.

    Raises:
        UserError: the world or the global batch does not divide.
    """
    recorded = {record.rank: record.data["samples"] for record in records if "samples" in record.data}
    return check_shares({**all_shares(world, batch), **recorded}, world, batch, phase)


def check_shares(
    shares: Mapping[int, Samples], world: World, batch: GlobalBatch, phase: Phase = "step"
) -> list[Finding]:
    """Find ranks that do not read their share.

    Args:
        shares: of every rank of the world.
    """
    findings = Findings(phase)
    copies: dict[int, list[int]] = {}
    for rank in range(world.size):
        copies.setdefault(world.data_parallel_rank(rank), []).append(rank)
    size = len(copies)
    usual = {place: _usual_rank(shares, ranks, batch.share(place, size), findings) for place, ranks in copies.items()}
    _check_disjoint({rank: shares[rank] for rank in usual.values()}, batch, findings)
    return list(findings)


def _usual_rank(shares: Mapping[int, Samples], ranks: Sequence[int], expected: Samples, findings: Findings) -> int:
    """Report ranks that hold parts of one copy of the model and read other samples than another; return a rank that
    reads what it should, or else what most of them do."""
    read = {rank: tuple(map(tuple, shares[rank])) for rank in ranks}
    counted = Counter(read.values())
    right = tuple(map(tuple, expected))
    usual = right if right in counted else counted.most_common(1)[0][0]
    other = next(rank for rank in ranks if read[rank] == usual)
    for rank in ranks:
        if read[rank] != usual:
            place, mine, theirs = next(_differences(read[rank], usual))
            findings.add(
                ("unequal",),
                f"rank {rank} reads {_name(mine)} in micro-batch {place + 1}, rank {other} of the same data-parallel "
                f"rank reads {_name(theirs)}",
            )
    return other


def _differences(share: Samples, other: Samples) -> Iterator[tuple[int, Sequence[int], Sequence[int]]]:
    """Micro-batches in which two shares differ: number and samples of both, none where a share has ended."""
    for place, (mine, theirs) in enumerate(itertools.zip_longest(share, other, fillvalue=())):
        if mine != theirs:
            yield place, mine, theirs


def _check_disjoint(shares: Mapping[int, Samples], batch: GlobalBatch, findings: Findings) -> None:
    """Compare what all data-parallel ranks read, one rank each, with the global batch."""
    readers: dict[int, list[int]] = {}
    for rank, share in shares.items():
        for sample in (sample for part in share for sample in part):
            readers.setdefault(sample, []).append(rank)
    for sample, ranks in readers.items():
        if sample not in batch.samples:
            findings.add(
                ("foreign",),
                f"rank {ranks[0]} reads sample {sample:,}, which is not of the step's {batch.samples.start:,} to "
                f"{batch.samples.stop - 1:,}",
            )
        elif len(ranks) > 1:
            findings.add(("twice",), f"sample {sample:,} is read more than once: by ranks {list_ranks(ranks)}")
    for sample in batch.samples:
        if sample not in readers:
            findings.add(("missing",), f"sample {sample:,} of the step is read by no rank")


def _name(samples: Sequence[int]) -> str:
    return f"samples {', '.join(map(str, samples))}" if samples else "nothing"
