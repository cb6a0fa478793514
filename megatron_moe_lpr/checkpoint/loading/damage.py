"""Decides whether a file of a checkpoint is damaged: only if every rank repeatedly reads the same wrong content."""

import socket
from pathlib import Path

from megatron_moe_lpr.checkpoint.format.card import read_card
from megatron_moe_lpr.checkpoint.format.directory import CARD_FILE, SIDE_DIRECTORY
from megatron_moe_lpr.errors import DamagedFile, UserError
from megatron_moe_lpr.files.checksum_file import verify_file
from megatron_moe_lpr.parallel.every_rank import decide_on_rank_0, on_every_rank

RANKS_SHOWN = 4
READS = 2
"""How often every rank reads a suspected file again."""


def prove_damage(suspected: DamagedFile, directory: Path) -> str:
    """Let every rank read a suspected file of an iteration directory again. Every rank must call it.

    A wrong checksum may also be caused by one node's memory, network or mount. A file counts as damaged if all ranks
    find the same fault in each of `READS` reads.

    Returns:
        The fault.

    Raises:
        UserError: on every rank: some rank cannot read the file, or the ranks, or two reads, differ.
    """
    if suspected.path is None:
        raise UserError(f"{suspected}; nothing was changed")
    path = suspected.path
    findings = [on_every_rank(lambda: _finding(path, directory)) for _ in range(READS)]
    fault, intact, wrong = decide_on_rank_0((socket.gethostname(), findings), _compare)
    if fault is not None:
        return fault
    raise UserError(
        f"{suspected}. But ranks and reads differ: intact for {intact}; damaged for {wrong}. Nothing "
        "was changed; look for failing memory, network or mounts on these hosts, then start again"
    )


def _compare(reads: list[tuple[str, list[str | None]]]) -> tuple[str | None, str, str]:
    """Compare the reads of all ranks, each with its host: the fault that all found, if it is one; else which ranks
    found the file intact and which damaged."""
    found = {finding for _, findings in reads for finding in findings}
    fault = found.pop() if len(found) == 1 else None
    names = [(f"rank {rank} on {host}", findings) for rank, (host, findings) in enumerate(reads)]
    intact = [name for name, findings in names if None in findings]
    wrong = [name for name, findings in names if any(findings)]
    return fault, _listed(intact), _listed(wrong)


def _finding(path: Path, directory: Path) -> str | None:
    """The fault of a file; None: it is intact."""
    try:
        if not verify_file(path, directory) and path == directory / SIDE_DIRECTORY / CARD_FILE:
            read_card(path)
    except DamagedFile as error:
        return str(error)
    return None


def _listed(names: list[str]) -> str:
    shown = names[:RANKS_SHOWN] + ([f"{len(names) - RANKS_SHOWN} more"] if len(names) > RANKS_SHOWN else [])
    return ", ".join(shown) or "none"
