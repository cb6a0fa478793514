"""UserError, the one exception for bad input, and `run_command`, which turns it into one line and an exit code.

Errors of the user and of the machine end in one `error:` line: `UserError`, Ctrl-C, a closed standard output, an
`OSError` that names a file or reports a full disk, a limit or a permission, and torch's `CheckpointException` (a
`BaseException`) if each of its causes is one of these. Every other exception is a defect of this project and keeps its
traceback.
"""

import contextlib
import errno
import os
import re
import select
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

# Errors of the machine also where they name no file: a failed write to an open file never names it.
MACHINE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
)
MAX_LINE = 2000
BROKEN_PIPE_CODE = 141
"""128 + SIGPIPE, as a shell reports a program that died of it."""
INTERRUPTED_CODE = 130
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")


class UserError(Exception):
    """Bad input: the message names the file or flag and says what to do."""


class DamagedFile(UserError):
    """A file is not as it was written. `path` is the file, where one is known."""

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


def fail(message: str, code: int = 1) -> NoReturn:
    """Print one `error:` line on standard error and exit. Control characters are removed and long text is cut."""
    line = _CONTROL.sub(" ", message)
    line = line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..."
    # Standard error may be closed; the exit code still reports the failure.
    with contextlib.suppress(OSError):
        print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(code)


@contextlib.contextmanager
def name_file_in_oserror(path: Path | str) -> Iterator[None]:
    """Set the file name of an OSError raised in the block that names no file, as that of a write to an open file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and turn expected errors into exit codes: 1, 130 (Ctrl-C) or 141 (closed output)."""
    try:
        main()
        sys.stdout.flush()
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _output_is_broken():
            _discard_output()
            sys.exit(BROKEN_PIPE_CODE)
        if isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr, flush=True)
            sys.exit(INTERRUPTED_CODE)
        reason = explain(error)
        if reason is None:
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            _discard_output()
        fail(reason)


def explain(error: BaseException) -> str | None:
    """Return one line about an error of the user or the machine; None: it is a defect of this project."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return _explain_os_error(error)
    failures = _checkpoint_failures(error)
    reasons = [explain(cause) for cause in failures]
    return f"checkpoint: {reasons[0]}" if reasons and None not in reasons else None


def _explain_os_error(error: OSError) -> str | None:
    if error.filename is None and error.errno not in MACHINE_ERRORS:
        return None
    place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return f"{place}{error.strerror or error}; nothing was left half-written"


def _checkpoint_failures(error: BaseException) -> list[BaseException]:
    """Return the causes of torch's CheckpointException, without importing torch for it; else nothing."""
    module = sys.modules.get("torch.distributed.checkpoint.api")
    if module is None or not isinstance(error, module.CheckpointException):
        return []
    return [cause for cause, _ in error.failures.values()]


def _output_is_broken() -> bool:
    """Return whether standard output is a pipe whose reading end is closed."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return False


def _discard_output() -> None:
    """Redirect standard output to /dev/null, so that Python's last flush of it cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
