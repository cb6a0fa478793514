"""Checks of a target directory and the small files in it."""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_moe_lpr.errors import UserError


def check_separate(source: Path, source_flag: str, target: Path, target_flag: str) -> None:
    """Refuse a target that is the source, lies in it or holds it: overwriting would destroy what is being read.

    Raises:
        UserError: naming both flags.
    """
    first, second = Path(source).resolve(), Path(target).resolve()
    if first == second or first in second.parents or second in first.parents:
        raise UserError(f"{target_flag} {target}: must lie apart from {source_flag} {source}")


def check_disk_space(directory: Path, num_bytes: int) -> None:
    """Refuse at once what the disk cannot hold, instead of after an hour of work.

    Raises:
        UserError: saying how much is needed and how much there is.
    """
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise UserError(
            f"{directory.parent}: no space left on device: {num_bytes / 1e6:,.1f} MB are needed, "
            f"{free / 1e6:,.1f} MB are free"
        )


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON object as Hugging Face does: sorted, indented."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
