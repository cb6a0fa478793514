"""Whether a file of a checkpoint is damaged: only where every rank reads the same wrong content, time and again."""

from pathlib import Path

from megatron_moe_lpr.checkpoint.card import read_card
from megatron_moe_lpr.checkpoint.directory import CARD_FILE, SIDE_DIRECTORY
from megatron_moe_lpr.checkpoint.integrity import verify_file
from megatron_moe_lpr.errors import DamagedFile, UserError
from megatron_moe_lpr.parallel.every_rank import on_every_rank

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
    findings = [on_every_rank(lambda: _finding(path, directory)) for _ in range(READS)]
    if findings[0][0] is None or any(finding != findings[0][0] for read in findings for finding in read):
        raise UserError(
            f"{suspected}, but not for every rank at every read: {_described(findings)}; nothing was changed. "
            "Look for failing memory, network or mounts on these hosts, then start again"
        )
    return findings[0][0]


def _finding(path: Path, directory: Path) -> str | None:
    """What is wrong with a file, None: nothing."""
    try:
        if not verify_file(path, directory) and path == directory / SIDE_DIRECTORY / CARD_FILE:
            read_card(path)
    except DamagedFile as error:
        return str(error)
    return None


def _described(findings: list[list[str | None]]) -> str:
    intact = [rank for rank in range(len(findings[0])) if any(read[rank] is None for read in findings)]
    if intact:
        return f"rank{'s' if len(intact) > 1 else ''} {', '.join(map(str, intact[:8]))} read it as it was written"
    return "what they read differs"
