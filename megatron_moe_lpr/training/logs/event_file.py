"""TensorBoard's event files, written so that each step is there once after any resume.

torch's SummaryWriter names files by the clock and writes them from a thread. TensorBoard reads files in the order of
their names, and what a run that resumes says of later steps (`SessionLog.START`) hides only what it has read before. A
clock that was set back would let it hide the steps of the new start instead.
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_moe_lpr.errors import naming
from megatron_moe_lpr.files.filesystem import append_whole

NAME = "events.out.tfevents"


class EventFile:
    """Appends scalars and texts to a new event file, the last of its directory by name."""

    def __init__(self, directory: Path, iteration: int) -> None:
        """Create it.

        Args:
            iteration: where the run goes on from; what the directory's files say of later steps is hidden.

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
        with naming(directory):
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
    """What TensorBoard's RecordWriter writes to."""

    def __init__(self, blocks: list[bytes]) -> None:
        self.write = blocks.append


def _stamps(directory: Path) -> list[int]:
    """The numbers by which the event files of a directory are ordered."""
    numbers = (path.name.removeprefix(f"{NAME}.").split(".")[0] for path in directory.glob(f"{NAME}.*"))
    return [int(number) for number in numbers if number.isascii() and number.isdigit()]
