"""The store of torch.distributed, which rank 0's launcher keeps: notes of the ranks' heartbeats, and who reads them."""

import dataclasses
import json
import time

import torch.distributed as dist

from megatron_moe_lpr.training.watchdog import examination
from megatron_moe_lpr.training.watchdog.examination import Examination
from megatron_moe_lpr.training.watchdog.hang_report import Note, NoteBoard


@dataclasses.dataclass(frozen=True)
class StoreCosts:
    """Of one world; a beat is a tenth of a minute at the default time-out of ten minutes."""

    keys: int
    note: int
    """Bytes of a rank's note: all that a rank sends in a beat."""
    beat: float
    """Seconds in which the store takes the notes of all ranks, one after the other."""
    read: float
    """Seconds in which one rank reads all notes, where ranks wait for long."""
    findings: int
    """Bytes that each other rank reads then, instead of all notes."""


def measure_store(size: int) -> StoreCosts:
    """Let one client write the notes of all ranks to a TCPStore, and examine them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    board = NoteBoard(store, size)
    note = Note(100, 1000, "all_reduce in agree (agreement.py:49)", "node-0123.cluster", 123456, 450.0, True)
    before = time.process_time()
    for rank in range(size):
        board.write(rank, note)
    middle = time.process_time()
    board.read()
    after = time.process_time()
    own = Examination(board, 0, examination.SILENCE_SECONDS, 600.0)
    found = own.beat()
    return StoreCosts(
        keys=store.num_keys(),
        note=len(json.dumps(dataclasses.asdict(note))),
        beat=middle - before,
        read=after - middle,
        findings=len(str(found)),
    )
