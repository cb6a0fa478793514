"""The marker that a run writes to --save when it starts: every rank and later start recognizes the directory by it.

Where a file system is not mounted, the directory of the run's checkpoints is empty or missing. A run that started again
there at step 0 would be lost.
"""

import datetime
import json
import os
import socket
import time
import uuid
from pathlib import Path

from megatron_moe_lpr.checkpoint.format.directory import LATEST_FILE
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import write_json
from megatron_moe_lpr.parallel.every_rank import first_on_any_rank, on_every_rank, on_rank_0
from megatron_moe_lpr.training.run_directory.run_lock import LOCK_FILE

MARKER = ".started"
TRACES = (MARKER, LOCK_FILE, LATEST_FILE, "metrics.jsonl")
"""Files that a run writes to --save; the directories of its checkpoints begin with TRACE_PREFIXES."""
TRACE_PREFIXES = ("iter_", "damaged-iter_", ".iter_")
RESTART_COUNTS = {
    "SLURM_RESTART_COUNT": "SLURM has requeued this job",
    "TORCHELASTIC_RESTART_COUNT": "torchrun has restarted these workers",
}
PAUSES = (0.2, 0.5, 1.0, 3.0)
"""Seconds to wait for a file that another node has just written: network file systems cache directories."""


def refuse_lost_directory(save: Path, load: Path) -> None:
    """On rank 0, before anything is written: check that a restarted run finds files of its earlier start in `save`.

    A SLURM job may run several stages: a stage that loads a checkpoint of the same job may start after a requeue.

    Raises:
        UserError: SLURM or torchrun has restarted this run, and `save` holds nothing of an earlier start.
    """
    if int(os.environ.get("RANK", 0)) or _has_begun(save) or _is_of_this_job(load):
        return
    for name, words in RESTART_COUNTS.items():
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 0:
            raise UserError(
                f"--save {save}: {words} ({name} {count}), but no start has left anything there; is its file system "
                f"mounted on {socket.gethostname()}? Where this run has never begun: "
                f"mkdir -p '{save}' && touch '{save / MARKER}'"
            )


def _has_begun(save: Path) -> bool:
    names = os.listdir(save) if os.path.lexists(save) else []
    return any(name in TRACES or name.startswith(TRACE_PREFIXES) for name in names)


def _is_of_this_job(load: Path) -> bool:
    """Whether the checkpoint `load` was written by a run of this SLURM job."""
    job = os.environ.get("SLURM_JOB_ID")
    for directory in (load, load.parent) if job else ():
        try:
            return json.loads((directory / MARKER).read_text(encoding="utf-8")).get("job") == job
        except (OSError, ValueError, AttributeError):
            continue
    return False


def mark_start(save: Path) -> None:
    """On rank 0, which holds the directory's lock: write a marker that is unique to this start."""
    if int(os.environ.get("RANK", 0)):
        return
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    content: dict[str, str | None] = {"start": uuid.uuid4().hex, "host": socket.gethostname(), "since": since}
    content["job"] = os.environ.get("SLURM_JOB_ID")
    write_json(content, save / MARKER)


def check_same_directory(save: Path) -> None:
    """Check that every rank sees the marker that rank 0 has written to `save`. Every rank must call it.

    Raises:
        UserError: on every rank: naming a rank that does not see it, and its host.
    """
    expected, first_host = on_rank_0(lambda: (_read(save), socket.gethostname()))
    sees = on_every_rank(lambda: _sees(save, expected))
    if blind := first_on_any_rank(None if sees else socket.gethostname()):
        rank, host = blind
        raise UserError(
            f"--save {save}: rank {rank} on {host} does not see what rank 0 on {first_host} has written there; "
            "all nodes need the same file system, is it mounted there?"
        )


def mount_point(path: Path) -> Path:
    """Return the directory where the file system of an existing path is mounted."""
    path = path.resolve()
    return next(parent for parent in (path, *path.parents) if os.path.ismount(parent))


def _sees(save: Path, expected: str | None) -> bool:
    for pause in (*PAUSES, 0.0):
        # Listing the directory makes a network file system fetch it from its server again.
        if os.path.isdir(save.parent):
            os.listdir(save.parent)
        if _read(save) == expected:
            return True
        time.sleep(pause)
    return False


def _read(save: Path) -> str | None:
    try:
        return (save / MARKER).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
