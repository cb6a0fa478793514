"""Where file systems are mounted: such a directory can neither be renamed nor replaced."""

import os
import re
from pathlib import Path

MOUNT_TABLE = Path("/proc/self/mountinfo")


def is_mount_point(directory: Path) -> bool:
    """Whether a file system is mounted at `directory` (an absolute path without symbolic links).

    The system's table knows bind mounts too, which have the same device as the directory above them.
    """
    return os.path.ismount(directory) or directory in _mount_points()


def mount_points_below(directory: Path) -> list[Path]:
    """Mount points inside `directory` (an absolute path without symbolic links), at any depth."""
    return sorted(path for path in _mount_points() if directory in path.parents)


def _mount_points() -> set[Path]:
    try:
        lines = MOUNT_TABLE.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return set()
    fields = [line.split(" ") for line in lines]
    return {Path(_unescaped(one[4])) for one in fields if len(one) > 4}


def _unescaped(text: str) -> str:
    r"""The table writes a space as `\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
