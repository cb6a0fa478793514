"""The installed lm_eval: names of its tasks, and one run of it in a process of its own."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_moe_lpr.errors import UserError, name_file_in_oserror
from megatron_moe_lpr.files.json_files import write_json

SETTINGS_FILE = "settings.json"
"""Holds the settings of a complete run, so that the same run is not repeated."""

STARTED_FILE = "started"
"""Marks the directory of a run, so that what a killed run left may be replaced."""


def harness_version() -> str:
    """Return the version of lm_eval. Raises UserError if it is not installed."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("lm_eval is not installed; pip install -e '.[eval]' -c constraints.txt") from None


def known_tasks(include_path: Path | None = None) -> set[str]:
    """Return the names of tasks, groups and tags in the registry of lm_eval, which takes seconds to load.

    Args:
        include_path: directory with more tasks.

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
    """Run lm_eval, unless `output` holds the results of a run with the same settings.

    Args:
        launcher: the command before the flags of lm_eval; empty: this Python's `-m lm_eval`.
        settings: values of lm_eval's flags by their names without dashes; None leaves a flag out, True gives it without
            a value.
        output: directory of the results; an incomplete or different run in it is removed.

    Raises:
        UserError: lm_eval failed, or `output` holds other files than those of a run.
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
    with name_file_in_oserror(output):
        write_json(settings, output / SETTINGS_FILE)


def check_replaceable(output: Path) -> None:
    """Check that the directory of one benchmark is absent, empty, or holds an earlier run, which may be removed.

    Raises:
        UserError: it is a file, a link, or holds other files.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"{output}: is not a directory of an earlier run; remove it or choose another --output")
    is_ours = any((output / name).is_file() for name in (STARTED_FILE, SETTINGS_FILE))
    if output.is_dir() and not is_ours and any(output.iterdir()):
        raise UserError(f"{output}: holds something else than an earlier run; remove it or choose another --output")


def harness_command(launcher: Sequence[str], settings: dict[str, Any], output: Path) -> list[str]:
    """Return the command line of a run."""
    command = [*launcher] if launcher else [sys.executable, "-m", "lm_eval"]
    for name, value in settings.items():
        if value is not None:
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return [*command, "--output_path", str(output)]


def read_settings(output: Path) -> dict[str, Any] | None:
    """Return the settings of the complete run in a directory; None: there is no such run."""
    try:
        return json.loads((output / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
