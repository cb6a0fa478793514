"""The process that puts a rank's share of a checkpoint on the disk while the rank trains on.

It gets finished bytes in shared memory, so it needs neither torch nor CUDA: it starts in a fraction of a second and
takes some 20 MB. One line of JSON over a socket asks for a share and one answers:

    {"directory": "...", "files": [[name, begin, end], ...], "memory": bytes}
    {"files": {name: [bytes, checksum], ...}}   or   {"error": [number or null, "message"]}

Meanwhile the bytes that it has put on the disk since it started are the number in the file PROGRESS: the rank that
waits can see a writer that works, however long, from one that hangs.

    python -m megatron_moe_lpr.checkpoint.saving.writer_process SOCKET MEMORY PROGRESS PARENT

The first three are file descriptors, the last a process number.
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
"""After so many the disk must have them, so that no fsync takes long at the end."""
PROGRESS_BYTES = 8
IGNORED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""What batch systems and terminals send to every process of a job: the rank decides, and this process finishes."""


def main() -> None:
    """Write shares until the parent closes its end of the socket, or ends."""
    control, memory, progress, parent = map(int, sys.argv[1:])
    for name in IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    end_with_parent(parent=parent)
    with socket.socket(fileno=control) as connection, connection.makefile("rw", encoding="utf-8") as lines:
        for line in lines:
            lines.write(json.dumps(_answer(json.loads(line), memory, Progress(progress))) + "\n")
            lines.flush()


class Progress:
    """A number that two processes share by a file, which grows with what the one has done."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def add(self, count: int) -> None:
        """In the process that works."""
        os.pwrite(self.descriptor, (self.read() + count).to_bytes(PROGRESS_BYTES, "little"), 0)

    def read(self) -> int:
        """In either; 0 as long as nothing was added."""
        return int.from_bytes(os.pread(self.descriptor, PROGRESS_BYTES, 0), "little")


def _answer(request: dict[str, Any], memory: int, progress: Progress) -> dict[str, Any]:
    try:
        # Not closed by name: after an error its traceback still looks into it.
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
    """One file, on the disk (fsync) when this returns: its size and checksum."""
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
