"""A rank's side of the writer process: copy the share out of the way of training, hand it over, hear how it went."""

import contextlib
import ctypes
import json
import mmap
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller, AsyncRequest

from megatron_moe_lpr.checkpoint.saving.share_writer import ShareWriter, writer_of
from megatron_moe_lpr.checkpoint.saving.writer_process import Progress
from megatron_moe_lpr.files.checksums import FileChecksum
from megatron_moe_lpr.liveness import advance, counting, waiting_for
from megatron_moe_lpr.megatron.overriding import override, overrides_megatron
from megatron_moe_lpr.processes import start_thread

END_SECONDS = 10
"""How long a writer process that has nothing to do may take to end."""


class SharedMemory:
    """Host memory that a child sees too, without a name and without a limit but the machine's."""

    def __init__(self) -> None:
        self.descriptor = _unnamed_file()
        self.content: mmap.mmap | None = None

    @property
    def size(self) -> int:
        """Bytes it has now."""
        return len(self.content) if self.content else 0

    def reserve(self, size: int) -> None:
        """Have at least `size` bytes; what is there may be lost.

        Raises:
            OSError: the machine has no such memory.
        """
        if size <= self.size:
            return
        self._unmap()
        os.ftruncate(self.descriptor, size)
        if hasattr(os, "posix_fallocate"):
            # Else a write into the memory, where none is left, would kill this process without a word.
            os.posix_fallocate(self.descriptor, 0, size)
        self.content = mmap.mmap(self.descriptor, size)

    def touch(self) -> None:
        """Have every page in this process's tables, which a first write would take one at a time. Holds no lock of
        Python's meanwhile."""
        if self.content:
            ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(self.content)), 0, self.size)

    def close(self) -> None:
        """Give it back."""
        self._unmap()
        os.close(self.descriptor)

    def _unmap(self) -> None:
        if self.content:
            self.content.close()
            self.content = None


class MemoryStream:
    """Writes into shared memory from an offset on."""

    def __init__(self, memory: SharedMemory, begin: int) -> None:
        self.memory, self.position = memory, begin

    def write(self, block: Any) -> int:
        """Copy a bytes-like object whole."""
        source = memoryview(block).cast("B")
        end = self.position + source.nbytes
        content = self.memory.content
        if content is None or end > len(content):
            raise ValueError("a share is larger than planned")
        with memoryview(content) as target:
            target[self.position : end] = source
        self.position = end
        advance()
        return source.nbytes

    def tell(self) -> int:
        """Where the next block goes."""
        return self.position

    def flush(self) -> None:
        """Nothing waits."""


@overrides_megatron
class BackgroundWriter(AsyncCaller):
    """Megatron-Core's AsyncCaller over a process that only writes.

    Its own PersistentAsyncCaller reads tensors of the CPU while training changes them, dies of the job's signals, waits
    for ever when its process was killed, and holds torch and a CUDA context for each rank.
    """

    def __init__(self) -> None:
        """Start the process; it is ready long before the first share is."""
        self.memory, self.progress = SharedMemory(), Progress(_unnamed_file())
        ours, theirs = socket.socketpair()
        descriptors = (theirs.fileno(), self.memory.descriptor, self.progress.descriptor)
        arguments = map(str, (*descriptors, os.getpid()))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatron_moe_lpr.checkpoint.saving.writer_process", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=descriptors,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            # Signals to the job's process group are not for it.
            start_new_session=True,
        )
        theirs.close()
        self.connection = ours
        self.lines = ours.makefile("rw", encoding="utf-8")
        self.active: ShareWriter | None = None
        self.reserving: threading.Thread | None = None
        self.closed = False

    def expect(self, writer: ShareWriter) -> None:
        """Take the memory for a share like this one beside what this process does, so that the first save finds it."""
        size = sum(file.most_bytes for file in writer.files)
        writer.release()

        def reserve() -> None:
            # Where there is none, the save will say so.
            with contextlib.suppress(OSError):
                self.memory.reserve(size)
                self.memory.touch()

        self.reserving = start_thread(reserve, "the memory of a save")
        if self.reserving is None:
            reserve()

    def _wait_for_memory(self) -> None:
        if self.reserving:
            self.reserving.join()
            self.reserving = None

    @override
    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        """Copy the share of the request's ShareWriter and let the process write it.

        An error waits in the ShareWriter until all ranks can hear of it.
        """
        writer = writer_of(async_req)
        if not writer.files or writer.error is not None:
            return
        try:
            files = self._copy(writer)
            request = {"directory": str(writer.checkpoint_dir), "files": files, "memory": self.memory.size}
            self.lines.write(json.dumps(request) + "\n")
            self.lines.flush()
            self.active = writer
        except BrokenPipeError:
            writer.error = self._death()
        except Exception as error:
            writer.error = error
        finally:
            writer.release()

    def _copy(self, writer: ShareWriter) -> list[tuple[str, int, int]]:
        self._wait_for_memory()
        self.memory.reserve(sum(file.most_bytes for file in writer.files))
        files, begin = [], 0
        for file in writer.files:
            stream = MemoryStream(self.memory, begin)
            writer.results += file.write(stream)
            files.append((file.name, begin, stream.tell()))
            begin = stream.tell()
        return files

    @override
    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        """Whether every rank's share is written, or has failed. Every rank must call it, unless `no_dist`."""
        if self.active and (blocking or self._has_answered()):
            writer, self.active = self.active, None
            place = f"waiting for the checkpoint writer, process {self.process.pid}, in {writer.checkpoint_dir}"
            with waiting_for(place), counting(self.progress.read):
                self._hear(writer)
        busy = self.active is not None
        if no_dist:
            return not busy
        with waiting_for("the checkpoint writers of all ranks", on_peers=True):
            return self.sync_all_async_calls(busy)

    def _has_answered(self) -> bool:
        # Not select(): it refuses descriptors above 1023, and gloo opens thousands.
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        return bool(poll.poll(0))

    def _hear(self, writer: ShareWriter) -> None:
        try:
            answer = json.loads(self.lines.readline() or "null")
        except (OSError, ValueError):
            answer = None
        if answer is None:
            writer.error = self._death()
        elif "error" in answer:
            number, message = answer["error"]
            writer.error = OSError(number, message) if number else RuntimeError(message)
        else:
            writer.written |= {name: FileChecksum(*entry) for name, entry in answer["files"].items()}

    def _death(self) -> Exception:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        return RuntimeError(
            f"rank {dist.get_rank()}: its writer process {self.process.pid} ended (exit code {self.process.returncode})"
        )

    @override
    def close(self, abort: bool = False) -> None:
        """End the process; with `abort`, or where it does not end by itself, by force."""
        if self.closed:
            return
        if abort:
            self.process.kill()
        for end in (self.lines, self.connection):
            with contextlib.suppress(OSError):
                end.close()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            # A process that waits for a disk ends only when the disk answers.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)
        self._wait_for_memory()
        self.memory.close()
        os.close(self.progress.descriptor)
        self.closed = True

    @override
    def __del__(self) -> None:
        """The base class demands one; whoever made this object closes it."""


def _unnamed_file() -> int:
    """A descriptor of a file that is only in memory, or where that does not exist, of one already deleted."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("checkpoint")
    with tempfile.TemporaryFile() as stream:
        return os.dup(stream.fileno())
