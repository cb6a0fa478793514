"""metrics.jsonl: one JSON line a record, each step once, whatever was killed and started again in between."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_moe_lpr.errors import naming
from megatron_moe_lpr.files.filesystem import append_whole, atomic_file

Key = tuple[str, int, str | None]
"""Kind, iteration and, of a validation, its dataset: what a record is of."""


class MetricsFile:
    """Appends records; a run that resumes takes away what lies after its checkpoint, since it will write it again."""

    def __init__(self, path: Path, iteration: int) -> None:
        """Open the log of a run that goes on from `iteration`: later records and lines cut short are removed.

        Raises:
            OSError: the file cannot be read or written.
        """
        self.path = path
        self._keys: set[Key] = set()
        """Records of this iteration that are there already: a run's last evaluation may be cut off and repeated."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._keep_until(iteration)

    def append(self, kind: str, iteration: int, values: dict[str, Any]) -> None:
        """Write one record, whole or not at all; one that is there already is replaced.

        Raises:
            OSError: naming the file, for example because the disk is full; the file stays as it was.
        """
        key = (kind, iteration, values.get("dataset"))
        if key in self._keys:
            self._rewrite(lambda other: other != key)
            self._keys.discard(key)
        line = json.dumps({"kind": kind, "iteration": iteration, **values}, ensure_ascii=False) + "\n"
        append_whole(self.path, line.encode("utf-8"))

    def datasets(self, iteration: int) -> set[str]:
        """Validation datasets that had a result of this iteration, the one it goes on from, when it was opened."""
        return {name for _, number, name in self._keys if number == iteration and name is not None}

    def _keep_until(self, iteration: int) -> None:
        complete, total = 0, 0
        with open(self.path, "rb") as stream:
            for line in stream:
                total += 1
                key = _key(line)
                if key is not None and key[1] <= iteration:
                    complete += 1
                    if key[1] == iteration:
                        self._keys.add(key)
        if complete < total:
            self._rewrite(lambda key: key[1] <= iteration)

    def _rewrite(self, is_kept) -> None:
        with naming(self.path), atomic_file(self.path) as partial, open(partial, "wb") as target:
            target.writelines(line for key, line in self._records() if is_kept(key))

    def _records(self) -> Iterator[tuple[Key, bytes]]:
        with open(self.path, "rb") as stream:
            for line in stream:
                key = _key(line)
                if key is not None:
                    yield key, line


def _key(line: bytes) -> Key | None:
    """None: not a whole record, as a kill or a full disk leaves it."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
        kind, iteration, dataset = record["kind"], record["iteration"], record.get("dataset")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    is_key = isinstance(kind, str) and type(iteration) is int and (dataset is None or isinstance(dataset, str))
    return (kind, iteration, dataset) if is_key else None
