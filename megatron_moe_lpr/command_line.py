"""Parse command lines into dataclasses, and report a wrong one in a single line."""

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
    """A command line that tyro rejects."""


def parse_flags(kind: Any, arguments: Sequence[str] | None = None, description: str | None = None) -> Any:
    """Parse a command line into a dataclass, or into one of a union of dataclasses as sub-commands.

    tyro reports a wrong flag in a box of many lines. Here a wrong flag, a value that the dataclass itself refuses
    (UserError) and a number out of its range (`flag_ranges`) each end in one `error:` line and exit code 2.

    Args:
        kind: the dataclass, or the union.
        arguments: words of the command line; None: those of this process.
        description: text for --help.
    """
    try:
        return read_flags(kind, arguments, description)
    except FlagError as error:
        fail(f"{error}; --help lists the flags", code=2)
    except UserError as error:
        fail(str(error), code=2)


def read_flags(kind: Any, arguments: Sequence[str] | None = None, description: str | None = None) -> Any:
    """Parse a command line as `parse_flags` does, but raise an error instead of ending the process.

    Raises:
        FlagError: a flag is unknown or missing, or a value is not of its flag's type.
        UserError: the dataclass itself refuses a value, or a number is out of its range.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            flags = tyro.cli(kind, args=arguments, description=description)
        check_ranges(flags)
        return flags
    except SystemExit as stop:
        if not stop.code:
            raise
        raise FlagError(_one_line(printed.getvalue())) from None
    finally:
        if sys.exc_info()[0] is None:
            sys.stderr.write(printed.getvalue())


def flag_words(values: Mapping[str, Any], place: str) -> list[str]:
    """Return the words of a command line that gives these values to these flags.

    Args:
        values: value by name of the flag, with underscores or hyphens; for None and empty lists the flag is left out.
        place: where the values are from, such as a file; for error messages.

    Raises:
        UserError: a value is of a type that no flag has, or a list holds a truth value.
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
        # YAML reads the language code `no` (Norwegian) as False.
        raise UserError(f"{place} holds a truth value; put quotes around words such as 'no' and 'on'")
    if isinstance(value, dict | list | tuple):
        raise UserError(f"{place} holds a {type(value).__name__} where one value is expected")
    return str(value)


def _one_line(box: str) -> str:
    """Return the error messages in tyro's box as one line, without the help texts that tyro adds."""
    paragraphs: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:
        text = line.strip().strip(SIDES).strip()
        if text.strip(RULES):
            paragraphs[-1].append(text)
        else:
            paragraphs.append([])
    messages = []
    for lines in paragraphs:
        text = re.sub(r"\s+", " ", " ".join(lines))
        missing = [line.split()[0] for line in lines if line.startswith("--") or line.isupper()]
        if text.startswith("Missing") and missing:
            messages.append("missing " + ", ".join(missing))
        elif text and not text.startswith(HELP_TEXTS):
            messages.append(text.rstrip("."))
    return "; ".join(messages)
