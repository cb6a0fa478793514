"""The one exception for bad input, and the wrapper that turns it into one line and an exit code."""

import errno
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something the user gave is wrong: the message names the file or flag and says what to do."""


def fail(message: str, code: int = 1) -> NoReturn:
    """Print one `error:` line on standard error and exit."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def run_command(main: Callable[[], None]) -> None:
    """Run a command line's `main`; bad input, a full disk or Ctrl-C end in one line and a non-zero exit code.

    Anything else is a defect of this project and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        place = f" ({error.filename})" if error.filename else ""
        fail(f"{error.strerror}{place}; nothing was left half-written")
