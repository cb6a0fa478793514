"""Flags from dataclasses, and what is wrong with them in one line."""

import contextlib
import io
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

from megatron_moe_lpr.errors import UserError, fail
from megatron_moe_lpr.flag_ranges import check_ranges

SIDES = "│|"
RULES = "╭╮╰╯─+-"
HELP_TEXTS = ("Argument helptext", "For full helptext", "Perhaps you meant")


class FlagError(UserError):
    """A command line that its parser does not accept."""


def parse_flags(kind: Any, arguments: Sequence[str] | None = None, description: str | None = None) -> Any:
    """Parse a command line into a dataclass, or a union of them as sub-commands.

    tyro explains a mistake in a box of many lines; here it ends in one `error:` line and exit code 2, and so does a
    value that the dataclass itself refuses (UserError) and a number out of its range (`flag_ranges`).
    """
    try:
        return read_flags(kind, arguments, description)
    except FlagError as error:
        fail(f"{error}; --help lists the flags", code=2)
    except UserError as error:
        fail(str(error), code=2)


def read_flags(kind: Any, arguments: Sequence[str] | None = None, description: str | None = None) -> Any:
    """Parse a command line as `parse_flags` does, and leave it to the caller what a mistake ends.

    Raises:
        FlagError: a flag that is unknown, missing or no value of its type.
        UserError: a value that the dataclass itself refuses.
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
        raise FlagError(_one_line(complaint.getvalue())) from None
    finally:
        if sys.exc_info()[0] is None:
            sys.stderr.write(complaint.getvalue())


def flag_words(values: Mapping[str, Any], place: str) -> list[str]:
    """Return values by flag as the words of a command line.

    Args:
        values: by flag, with underscores or hyphens; None and empty lists are left to the flag's default.
        place: names the values in an error, such as a file.

    Raises:
        UserError: a value of a type that no flag has, or a truth value in a list.
    """
    words: list[str] = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None or value in ([], ()):
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list | tuple):
            words += [flag, *(_word(one, f"{place}: {name}") for one in value)]
        else:
            words.append(f"{flag}={_word(value, f'{place}: {name}')}")
    return words


def _word(value: Any, place: str) -> str:
    if isinstance(value, bool):
        # YAML's `no` is Norwegian here.
        raise UserError(f"{place} holds a truth value; put quotes around words such as 'no' and 'on'")
    if isinstance(value, dict | list | tuple):
        raise UserError(f"{place} holds a {type(value).__name__} where one value is expected")
    return str(value)


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
