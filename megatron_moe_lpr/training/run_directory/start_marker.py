"""What a run leaves in --save when it begins: by it a later start, and every rank, knows that it is the same directory.

A file system that is not mounted shows an empty directory, or none, where the run's checkpoints should be. To begin
again there at step 0 would be the loss of the run.
"""

import datetime
import json
import os
import socket
import time
import uuid
from pathlib import Path

import torch.distributed as dist

from megatron_moe_lpr.checkpoint.format.directory import LATEST_FILE
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.filesystem import atomic_file
from megatron_moe_lpr.parallel.every_rank import on_every_rank
from megatron_moe_lpr.training.run_directory.run_lock import LOCK_FILE

MARKER = ".started"
TRACES = (MARKER, LOCK_FILE, LATEST_FILE, "metrics.jsonl")
"""Files of a run that has begun; the directories of its checkpoints are further ones."""
TRACE_PREFIXES = ("iter_", "damaged-iter_", ".iter_")
RESTART_COUNTS = {
    "SLURM_RESTART_COUNT": "SLURM has requeued this job",
    "TORCHELASTIC_RESTART_COUNT": "torchrun has restarted these workers",
}
PAUSES = (0.2, 0.5, 1.0, 3.0)
"""Seconds between looks for what another node has just written: network file systems keep directories in memory."""


def refuse_lost_directory(save: Path, load: Path) -> None:
    """On rank 0, before anything is written: a run that was started before finds what it left there.

    A SLURM job may run several stages: one that goes on from a stage of the same job may begin after a requeue.

    Raises:
        UserError: a scheduler says that it has started this run before, and nothing in `save` is of an earlier start.
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
    """Whether the run that wrote a checkpoint was started by this SLURM job."""
    job = os.environ.get("SLURM_JOB_ID")
    for directory in (load, load.parent) if job else ():
        try:
            return json.loads((directory / MARKER).read_text(encoding="utf-8")).get("job") == job
        except (OSError, ValueError, AttributeError):
            continue
    return False


def mark_start(save: Path) -> None:
    """On rank 0, which has the directory's lock: leave a file that no other start has left."""
    if int(os.environ.get("RANK", 0)):
        return
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    content: dict[str, str | None] = {"start": uuid.uuid4().hex, "host": socket.gethostname(), "since": since}
    content["job"] = os.environ.get("SLURM_JOB_ID")
    with atomic_file(save / MARKER) as partial:
        partial.write_text(json.dumps(content) + "\n", encoding="utf-8")


def check_same_directory(save: Path) -> None:
    """Check that every rank sees in `save` what rank 0 has left there. Every rank must call it.

    Raises:
        UserError: on every rank: naming one that does not, and its host.
    """
    expected = on_every_rank(lambda: _read(save) if _rank() == 0 else None)[0]
    found = on_every_rank(lambda: (socket.gethostname(), _sees(save, expected)))
    for rank, (host, sees) in enumerate(found):
        if not sees:
            raise UserError(
                f"--save {save}: rank {rank} on {host} does not see what rank 0 on {found[0][0]} has written there; "
                "all nodes need the same file system, is it mounted there?"
            )


def mount_point(path: Path) -> Path:
    """Where the file system of an existing path is mounted."""
    path = path.resolve()
    return next(parent for parent in (path, *path.parents) if os.path.ismount(parent))


def _sees(save: Path, expected: str | None) -> bool:
    for pause in (*PAUSES, 0.0):
        # An opened directory is asked for anew at the server of a network file system.
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


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
