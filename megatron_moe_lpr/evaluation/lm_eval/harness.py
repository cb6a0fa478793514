"""lm_eval: the tasks that it knows, and one run of it in a process of its own."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_moe_lpr.errors import UserError, naming

SETTINGS_FILE = "settings.json"
"""Written when a run is complete: what it was, so that another one with the same settings need not be."""

STARTED_FILE = "started"
"""Written before a run, so that what a killed one left is known for that."""


def harness_version() -> str:
    """Raises UserError where lm_eval is not installed."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("lm_eval is not installed; pip install -e '.[eval]' -c constraints.txt") from None


def known_tasks(include_path: Path | None = None) -> set[str]:
    """Names of tasks, groups and tags in the installed lm_eval's registry; it takes some seconds to read.

    Args:
        include_path: directory with further tasks.

    Raises:
        UserError: lm_eval is not installed, or too old.
    """
    harness_version()
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"lm_eval cannot be used here: {error}; pip install -e '.[eval]' -c constraints.txt") from None
    return set(TaskManager(include_path=str(include_path) if include_path else None).all_tasks)


def run_harness(launcher: Sequence[str], settings: dict[str, Any], output: Path) -> None:
    """One call of lm_eval, unless `output` holds the results of one with the same settings.

    Args:
        launcher: the command before lm_eval's flags; empty: this Python's `-m lm_eval`.
        settings: lm_eval's flags without their dashes, to what they are; None leaves one out.
        output: directory of the results; an earlier, incomplete or different run in it is removed.

    Raises:
        UserError: lm_eval failed, or `output` holds something else than such a run.
    """
    if read_settings(output) == settings:
        print(f"{output}: already there")
        return
    check_replaceable(output)
    if output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / STARTED_FILE).touch()
    command = harness_command(launcher, settings, output)
    try:
        code = subprocess.run(command, check=False, env=os.environ).returncode
    except FileNotFoundError:
        raise UserError(f"--launcher: there is no command {command[0]}") from None
    if code:
        raise UserError(f"lm_eval ended with code {code} on {settings['tasks']}; the reason is above")
    with naming(output):
        (output / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def check_replaceable(output: Path) -> None:
    """Whether a directory for one benchmark is free, empty, or of an earlier run of this command.

    Raises:
        UserError: it is none of them; nothing else is ever removed.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"{output}: is not a directory of an earlier run; remove it or choose another --output")
    is_ours = any((output / name).is_file() for name in (STARTED_FILE, SETTINGS_FILE))
    if output.is_dir() and not is_ours and any(output.iterdir()):
        raise UserError(f"{output}: holds something else than an earlier run; remove it or choose another --output")


def harness_command(launcher: Sequence[str], settings: dict[str, Any], output: Path) -> list[str]:
    """The whole command line."""
    command = [*launcher] if launcher else [sys.executable, "-m", "lm_eval"]
    for name, value in settings.items():
        if value is not None:
            command += [f"--{name}", str(value)]
    return [*command, "--output_path", str(output)]


def read_settings(output: Path) -> dict[str, Any] | None:
    """Of the complete run in a directory; None: there is none."""
    try:
        return json.loads((output / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
