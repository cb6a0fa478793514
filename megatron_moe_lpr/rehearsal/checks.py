"""All checks of what rehearsed ranks were recorded to do."""

from collections.abc import Sequence

from megatron_moe_lpr.rehearsal.agreement import check_agreement
from megatron_moe_lpr.rehearsal.checkpoint_files import check_files
from megatron_moe_lpr.rehearsal.data_share import GlobalBatch, check_data_shares
from megatron_moe_lpr.rehearsal.findings import Finding
from megatron_moe_lpr.rehearsal.record import PHASES, RankRecord
from megatron_moe_lpr.rehearsal.symmetry import World


def check_records(records: Sequence[RankRecord], world: World, batch: GlobalBatch) -> list[Finding]:
    """Check that the ranks call the same collectives, wait for each other in no ring, read their shares of the data and
    write files of their own.

    Args:
        records: of all ranks, or of a sample: the others are stood in for as `symmetry` says.
        batch: the rehearsed step's samples.

    Returns:
        What is wrong, in the order of the run's phases.

    Raises:
        UserError: the world or the global batch does not divide.
    """
    shares = check_data_shares(records, world, batch)
    found = [*shares, *check_agreement(records, world), *check_files(records)]
    return sorted(found, key=lambda finding: PHASES.index(finding.phase))
