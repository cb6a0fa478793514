"""Flags from dataclasses, and what is wrong with them in one line."""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from megatron_moe_lpr.errors import UserError, fail
from megatron_moe_lpr.flag_ranges import check_ranges

SIDES = "│|"
RULES = "╭╮╰╯─+-"
HELP_TEXTS = ("Argument helptext", "For full helptext", "Perhaps you meant")


def parse_flags(kind: Any, arguments: Sequence[str] | None = None, description: str | None = None) -> Any:
    """Parse a command line into a dataclass, or a union of them as sub-commands.

    tyro explains a mistake in a box of many lines; here it ends in one `error:` line and exit code 2, and so does a
    value that the dataclass itself refuses (UserError) and a number out of its range (`flag_ranges`).
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            flags = tyro.cli(kind, args=arguments, description=description)
        check_ranges(flags)
        return flags
    except SystemExit as stop:
        if not stop.code:
            raise
        fail(f"{_one_line(complaint.getvalue())}; --help lists the flags", code=2)
    except UserError as error:
        fail(str(error), code=2)
    finally:
        if sys.exc_info()[0] is None:
            sys.stderr.write(complaint.getvalue())


def _one_line(box: str) -> str:
    """The complaints in a box, without the help texts that tyro adds, on one line."""
    paragraphs: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:
        text = line.strip().strip(SIDES).strip()
        if text.strip(RULES):
            paragraphs[-1].append(text)
        else:
            paragraphs.append([])
    complaints = []
    for lines in paragraphs:
        text = re.sub(r"\s+", " ", " ".join(lines))
        missing = [line.split()[0] for line in lines if line.startswith("--") or line.isupper()]
        if text.startswith("Missing") and missing:
            complaints.append("missing " + ", ".join(missing))
        elif text and not text.startswith(HELP_TEXTS):
            complaints.append(text.rstrip("."))
    return "; ".join(complaints)
