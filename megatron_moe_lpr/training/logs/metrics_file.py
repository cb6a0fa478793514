"""metrics.jsonl: one JSON record a line, appended only; of a step that is there twice the later record counts."""

import json
import os
from pathlib import Path
from typing import Any

from megatron_moe_lpr.errors import name_file_in_oserror
from megatron_moe_lpr.files.atomic_file import append_whole

RESUME = "resume"
"""Kind of the record that a resumed run writes first: records above it of later iterations do not count any more."""


class MetricsFile:
    """Appends records to the log of a run, over all its starts."""

    def __init__(self, path: Path, iteration: int) -> None:
        """Open the log of a run that resumes from `iteration` (0: starts).

        What a kill left of a last line is cut off. Where there are records of later iterations, which the run is about
        to repeat, a `resume` record says that they do not count.

        Raises:
            OSError: the file cannot be read or written.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        counted = _counted_records(path) if path.exists() else set()
        self.evaluated = {dataset for number, dataset in counted if number == iteration and dataset is not None}
        """Validation datasets that have a result of `iteration`: the last evaluation may have been interrupted."""
        if any(number > iteration for number, _ in counted):
            self.append(RESUME, iteration, {})

    def append(self, kind: str, iteration: int, values: dict[str, Any]) -> None:
        """Write one record, whole or not at all.

        Raises:
            OSError: naming the file, for example because the disk is full; the file stays as it was.
        """
        line = json.dumps({"kind": kind, "iteration": iteration, **values}, ensure_ascii=False) + "\n"
        append_whole(self.path, line.encode("utf-8"))


def _counted_records(path: Path) -> set[tuple[int, str | None]]:
    """Iteration and, of a validation, dataset of the records that count; cut off a last line without an end."""
    counted: set[tuple[int, str | None]] = set()
    with name_file_in_oserror(path), open(path, "rb+") as stream:
        complete = 0
        for line in stream:
            if not line.endswith(b"\n"):
                os.ftruncate(stream.fileno(), complete)
                break
            complete += len(line)
            kind, iteration, dataset = _key(line)
            if kind == RESUME:
                counted = {record for record in counted if record[0] <= iteration}
            elif kind is not None:
                counted.add((iteration, dataset))
    return counted


def _key(line: bytes) -> tuple[str | None, int, str | None]:
    """Kind, iteration and dataset of a record; kind None: the line is not a record."""
    try:
        record = json.loads(line)
        kind, iteration, dataset = record["kind"], record["iteration"], record.get("dataset")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, 0, None
    is_record = isinstance(kind, str) and type(iteration) is int
    return kind if is_record else None, iteration, dataset if isinstance(dataset, str) else None
