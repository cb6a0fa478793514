"""A rank's side of the writer process: copy the shard into shared memory, send a request, receive the result."""

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

from megatron_moe_lpr.checkpoint.saving.shard_writer import ShardWriter, request_writer
from megatron_moe_lpr.checkpoint.saving.writer_process import Progress
from megatron_moe_lpr.files.checksums import FileChecksum
from megatron_moe_lpr.liveness import advance, counting, waiting_for
from megatron_moe_lpr.megatron.overriding import override, overrides_megatron
from megatron_moe_lpr.processes import start_thread

END_SECONDS = 10
"""Seconds that an idle writer process may take to end."""


class SharedMemory:
    """Host memory shared with a child process: an unnamed file in memory, limited only by the machine."""

    def __init__(self) -> None:
        self.descriptor = _unnamed_file()
        self.content: mmap.mmap | None = None

    @property
    def size(self) -> int:
        """Bytes reserved now."""
        return len(self.content) if self.content else 0

    def reserve(self, size: int) -> None:
        """Reserve at least `size` bytes; the present content may be lost.

        Raises:
            OSError: the machine has no such memory.
        """
        if size <= self.size:
            return
        self._unmap()
        os.ftruncate(self.descriptor, size)
        if hasattr(os, "posix_fallocate"):
            # Without it, a write where no memory is left would kill this process by SIGBUS.
            os.posix_fallocate(self.descriptor, 0, size)
        self.content = mmap.mmap(self.descriptor, size)

    def touch(self) -> None:
        """Map every page into this process now; otherwise the first write would map them one at a time. Releases the
        GIL meanwhile."""
        if self.content:
            ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(self.content)), 0, self.size)

    def close(self) -> None:
        """Return the memory to the system."""
        self._unmap()
        os.close(self.descriptor)

    def _unmap(self) -> None:
        if self.content:
            self.content.close()
            self.content = None


class MemoryStream:
    """A binary stream that writes into shared memory from an offset on."""

    def __init__(self, memory: SharedMemory, begin: int) -> None:
        self.memory, self.position = memory, begin

    def write(self, block: Any) -> int:
        """Copy a whole bytes-like object."""
        source = memoryview(block).cast("B")
        end = self.position + source.nbytes
        content = self.memory.content
        if content is None or end > len(content):
            raise ValueError("a shard is larger than planned")
        with memoryview(content) as target:
            target[self.position : end] = source
        self.position = end
        advance()
        return source.nbytes

    def tell(self) -> int:
        """Offset of the next block."""
        return self.position

    def flush(self) -> None:
        """Nothing is buffered."""


@overrides_megatron
class BackgroundWriter(AsyncCaller):
    """An AsyncCaller of Megatron-Core whose process only writes bytes.

    Megatron-Core's PersistentAsyncCaller reads CPU tensors while training changes them, dies of the job's signals,
    waits for ever if its process was killed, and holds torch and a CUDA context for each rank.
    """

    def __init__(self) -> None:
        """Start the writer process."""
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
            # Keep signals to the job's process group away from it.
            start_new_session=True,
        )
        theirs.close()
        self.connection = ours
        self.lines = ours.makefile("rw", encoding="utf-8")
        self.active: ShardWriter | None = None
        self.reserving: threading.Thread | None = None
        self.closed = False

    def expect(self, writer: ShardWriter) -> None:
        """Reserve the memory for a shard like this one in a thread, so that the first save need not wait for it."""
        size = sum(file.most_bytes for file in writer.files)
        writer.release()

        def reserve() -> None:
            # The save itself will report that there is none.
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
        """Copy the shard of the request's ShardWriter and let the process write it.

        An error is kept in the ShardWriter until all ranks can be told.
        """
        writer = request_writer(async_req)
        if not writer.files or writer.error is not None:
            return
        try:
            files = self._copy(writer)
            request = {"directory": str(writer.checkpoint_dir), "files": files, "memory": self.memory.size}
            self.lines.write(json.dumps(request) + "\n")
            self.lines.flush()
            self.active = writer
        except BrokenPipeError:
            writer.error = self._exit_error()
        except Exception as error:
            writer.error = error
        finally:
            writer.release()

    def _copy(self, writer: ShardWriter) -> list[tuple[str, int, int]]:
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
        """Whether every rank's shard is written, or has failed. Every rank must call it, unless `no_dist`."""
        if self.active and (blocking or self._has_result()):
            writer, self.active = self.active, None
            place = f"waiting for the checkpoint writer, process {self.process.pid}, in {writer.checkpoint_dir}"
            with waiting_for(place), counting(self.progress.read):
                self._receive(writer)
        busy = self.active is not None
        if no_dist:
            return not busy
        with waiting_for("the checkpoint writers of all ranks", on_peers=True):
            return self.sync_all_async_calls(busy)

    def _has_result(self) -> bool:
        # Not select(): it refuses descriptors above 1023, and gloo opens thousands.
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        return bool(poll.poll(0))

    def _receive(self, writer: ShardWriter) -> None:
        try:
            result = json.loads(self.lines.readline() or "null")
        except (OSError, ValueError):
            result = None
        if result is None:
            writer.error = self._exit_error()
        elif "error" in result:
            number, message = result["error"]
            writer.error = OSError(number, message) if number else RuntimeError(message)
        else:
            writer.written |= {name: FileChecksum(*entry) for name, entry in result["files"].items()}

    def _exit_error(self) -> Exception:
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
            # A process in an uninterruptible wait for a disk ends only with that wait.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)
        self._wait_for_memory()
        self.memory.close()
        os.close(self.progress.descriptor)
        self.closed = True

    @override
    def __del__(self) -> None:
        """Required by the base class. The creator of this object calls `close`."""


def _unnamed_file() -> int:
    """Descriptor of a file in memory or, on systems without memfd_create, of a deleted temporary file."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("checkpoint")
    with tempfile.TemporaryFile() as stream:
        return os.dup(stream.fileno())
