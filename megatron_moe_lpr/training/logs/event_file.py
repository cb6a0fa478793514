"""TensorBoard's event files, written so that TensorBoard shows each step once after any resume.

torch's SummaryWriter names files by the clock. TensorBoard reads files in the order of their names, and a resume
(`SessionLog.START`) hides later steps only in what it has read before: with a clock that was set back, it would hide
the steps of the new start instead.
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_moe_lpr.errors import name_file_in_oserror
from megatron_moe_lpr.files.atomic_file import append_whole

NAME = "events.out.tfevents"


class EventFile:
    """Appends scalars and texts to a new event file, the last of its directory by name."""

    def __init__(self, directory: Path, iteration: int) -> None:
        """Create the file.

        Args:
            iteration: step that the run resumes from (0: it starts); later steps in earlier files are hidden.

        Raises:
            OSError: naming what cannot be written.
            ImportError: TensorBoard is not installed.
        """
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.text.summary import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._records = event_pb2.Event, summary_pb2.Summary, RecordWriter
        self._text = text_pb
        directory = Path(directory)
        with name_file_in_oserror(directory):
            directory.mkdir(parents=True, exist_ok=True)
            stamp = max([int(time.time()), *(found + 1 for found in _stamps(directory))])
        self.path = directory / f"{NAME}.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._append(
            self._event(wall_time=time.time(), file_version="brain.Event:2"),
            self._event(wall_time=time.time(), step=iteration + 1, session_log=start),
        )

    def add(self, iteration: int, values: Mapping[str, float]) -> None:
        """Write the scalars of one step, all or none.

        Raises:
            OSError: naming the file.
        """
        value, now = self._summary.Value, time.time()
        summary = self._summary(value=[value(tag=tag, simple_value=number) for tag, number in values.items()])
        self._append(self._event(wall_time=now, step=iteration, summary=summary))

    def add_text(self, iteration: int, tag: str, text: str) -> None:
        """Write a text in Markdown, for TensorBoard's page of texts.

        Raises:
            OSError: naming the file.
        """
        self._append(self._event(wall_time=time.time(), step=iteration, summary=self._text(tag, text)))

    def _append(self, *events: Any) -> None:
        blocks: list[bytes] = []
        writer = self._records(_Blocks(blocks))
        for event in events:
            writer.write(event.SerializeToString())
        append_whole(self.path, b"".join(blocks))


class _Blocks:
    """A file for TensorBoard's RecordWriter that collects what is written."""

    def __init__(self, blocks: list[bytes]) -> None:
        self.write = blocks.append


def _stamps(directory: Path) -> list[int]:
    """The times in the names of a directory's event files, by which TensorBoard orders them."""
    numbers = (path.name.removeprefix(f"{NAME}.").split(".")[0] for path in directory.glob(f"{NAME}.*"))
    return [int(number) for number in numbers if number.isascii() and number.isdigit()]
