"""Ends a process whose main thread holds Python's lock in native code for ever: no thread of it can run any more.

A child that hears a beat from a thread of the process every few seconds. It counts its own waits, not the clock's
seconds: a job that is suspended as a whole, this child with it, has not been silent.
"""

import contextlib
import faulthandler
import os
import subprocess
import sys

CODE = """
import os, select, signal, sys, time
pipe, parent, rank = map(int, sys.argv[1:4])
period, limit = map(float, sys.argv[4:])
for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
poll = select.poll()
poll.register(pipe, select.POLLIN)
silent = 0.0
while silent < limit:
    if not poll.poll(1000 * period):
        silent += period
    elif os.read(pipe, 4096):
        silent = 0.0
    else:
        sys.exit()
print(f"error: rank {rank} (process {parent}) hangs: its main thread holds Python's lock in native code for "
      f"{silent:.0f} s (--distributed-timeout-minutes); start again to go on from the last checkpoint",
      file=sys.stderr, flush=True)
for number in (signal.SIGABRT, signal.SIGKILL):
    if os.getppid() == parent:
        os.kill(parent, number)
        time.sleep(5)
"""


class OutsideWatch:
    """The child of this process that watches it."""

    def __init__(self, limit: float, period: float, rank: int) -> None:
        """Start it; without it, where the machine gives no process, there is a warning.

        Args:
            limit: seconds of silence after which it ends this process: by SIGABRT, at which Python prints the stacks of
                all threads, and then by SIGKILL.
            period: seconds between two beats.
        """
        self.wake: int | None = None
        ours, wake = os.pipe()
        os.set_blocking(wake, False)
        arguments = map(str, (ours, os.getpid(), rank, period, limit))
        try:
            with contextlib.suppress(AttributeError, OSError, ValueError, RuntimeError):  # no stream with a descriptor
                faulthandler.enable()
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", CODE, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(ours,),
            )
            self.wake = wake
        except OSError as error:
            os.close(wake)
            print(f"warning: no process to watch this one: {error}; raise `ulimit -u`", file=sys.stderr, flush=True)
        finally:
            os.close(ours)

    def beat(self) -> None:
        """Say that this process lives."""
        if self.wake is not None:
            with contextlib.suppress(OSError):  # the child has not read for long, or is gone
                os.write(self.wake, b".")

    def close(self) -> None:
        """End the child."""
        if self.wake is not None:
            os.close(self.wake)
            self.wake = None
            self.process.kill()
            self.process.wait()
