"""The process that writes a rank's shard of a checkpoint to the disk while the rank continues to train.

It finds the finished bytes in shared memory, so it needs neither torch nor CUDA: it starts in a fraction of a second
and takes some 20 MB. Over a socket it receives a request and returns a result, each one line of JSON:

    {"directory": "...", "files": [[name, begin, end], ...], "memory": bytes}
    {"files": {name: [bytes, checksum], ...}}   or   {"error": [number or null, "message"]}

The file PROGRESS holds the number of bytes written since the start, so that a rank that waits can distinguish a slow
writer from one that hangs.

    python -m megatron_moe_lpr.checkpoint.saving.writer_process SOCKET MEMORY PROGRESS PARENT

The first three are file descriptors, PARENT is a process id.
"""

import dataclasses
import json
import mmap
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from megatron_moe_lpr.files.checksums import ChecksumStream
from megatron_moe_lpr.processes import end_with_parent

BLOCK_BYTES = 8 << 20
SYNC_BYTES = 256 << 20
"""Bytes between two fsyncs, so that the last fsync does not take long."""
PROGRESS_BYTES = 8
IGNORED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Signals that batch systems and terminals send to every process of a job. The rank handles them; the shard is still
written."""


def main() -> None:
    """Write shards until the parent process closes its end of the socket, or ends."""
    control, memory, progress, parent = map(int, sys.argv[1:])
    for name in IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    end_with_parent(parent=parent)
    with socket.socket(fileno=control) as connection, connection.makefile("rw", encoding="utf-8") as lines:
        for line in lines:
            lines.write(json.dumps(_handle(json.loads(line), memory, Progress(progress))) + "\n")
            lines.flush()


class Progress:
    """A counter in a file that two processes share: one adds to it, the other reads it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def add(self, count: int) -> None:
        """Add to the counter. Only one process may call it."""
        os.pwrite(self.descriptor, (self.read() + count).to_bytes(PROGRESS_BYTES, "little"), 0)

    def read(self) -> int:
        """The counter; 0 if nothing was added yet."""
        return int.from_bytes(os.pread(self.descriptor, PROGRESS_BYTES, 0), "little")


def _handle(request: dict[str, Any], memory: int, progress: Progress) -> dict[str, Any]:
    """Write the files of a request; return their checksums, or the error."""
    try:
        # Not closed explicitly: after an error, frames of its traceback still refer to it.
        view = memoryview(mmap.mmap(memory, request["memory"], prot=mmap.PROT_READ))
        written = {
            name: _write(Path(request["directory"], name), view[begin:end], progress)
            for name, begin, end in request["files"]
        }
    except OSError as error:
        return {"error": [error.errno, f"{error.strerror}: {error.filename or request['directory']}"]}
    except Exception as error:
        return {"error": [None, f"{type(error).__name__}: {error}"]}
    return {"files": written}


def _write(path: Path, content: memoryview, progress: Progress) -> list[int | str]:
    """Write one file and wait until it is on the disk (fsync); return its size and checksum."""
    with ChecksumStream(open(path, "wb")) as stream:
        for begin in range(0, len(content), BLOCK_BYTES):
            progress.add(stream.write(content[begin : begin + BLOCK_BYTES]))
            if (begin + BLOCK_BYTES) % SYNC_BYTES == 0:
                stream.flush()
                os.fsync(stream.fileno())
                progress.add(1)
    progress.add(1)
    return list(dataclasses.astuple(stream.entry()))


if __name__ == "__main__":
    main()
