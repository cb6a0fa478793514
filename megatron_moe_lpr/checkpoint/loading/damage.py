"""Whether a file of a checkpoint is damaged: only where every rank reads the same wrong content, time and again."""

import socket
from pathlib import Path

from megatron_moe_lpr.checkpoint.format.card import read_card
from megatron_moe_lpr.checkpoint.format.directory import CARD_FILE, SIDE_DIRECTORY
from megatron_moe_lpr.errors import DamagedFile, UserError
from megatron_moe_lpr.files.checksums import verify_file
from megatron_moe_lpr.parallel.every_rank import on_every_rank

RANKS_SHOWN = 4
READS = 2
"""By every rank, after the one that raised the suspicion."""


def prove_damage(suspected: DamagedFile, directory: Path) -> str:
    """Let every rank read a suspected file of an iteration directory again. Every rank must call it.

    A checksum that does not fit may also come from one node's memory, network or mount. A file counts as damaged when
    all ranks find the same wrong with it, each of `READS` times.

    Returns:
        What is wrong with the file.

    Raises:
        UserError: on every rank: some rank cannot read the file, or the ranks, or two reads, differ.
    """
    if suspected.path is None:
        raise UserError(f"{suspected}; nothing was changed")
    path = suspected.path
    reads = [on_every_rank(lambda: (_finding(path, directory), socket.gethostname())) for _ in range(READS)]
    found = {finding for read in reads for finding, _ in read}
    if len(found) == 1 and None not in found:
        return str(found.pop())
    intact = [_name(rank, reads) for rank in range(len(reads[0])) if any(read[rank][0] is None for read in reads)]
    wrong = [_name(rank, reads) for rank in range(len(reads[0])) if any(read[rank][0] for read in reads)]
    raise UserError(
        f"{suspected}. But ranks and reads differ: intact for {_listed(intact)}; damaged for {_listed(wrong)}. Nothing "
        "was changed; look for failing memory, network or mounts on these hosts, then start again"
    )


def _finding(path: Path, directory: Path) -> str | None:
    """What is wrong with a file, None: nothing."""
    try:
        if not verify_file(path, directory) and path == directory / SIDE_DIRECTORY / CARD_FILE:
            read_card(path)
    except DamagedFile as error:
        return str(error)
    return None


def _name(rank: int, reads: list[list[tuple[str | None, str]]]) -> str:
    return f"rank {rank} on {reads[0][rank][1]}"


def _listed(names: list[str]) -> str:
    shown = names[:RANKS_SHOWN] + ([f"{len(names) - RANKS_SHOWN} more"] if len(names) > RANKS_SHOWN else [])
    return ", ".join(shown) or "none"
