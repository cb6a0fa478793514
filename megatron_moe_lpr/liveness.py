"""Progress of this process: a counter that working code advances and the watchdog reads to detect a hang.

Progress is a micro-batch read, computed or evaluated, an optimizer step, a block of a file read, written or compared
with its checksum, a dataset or index map built, and bytes that another process writes for this one. Waiting for a
collective, a loader process or a disk is no progress. Inside `long_work`, where libraries do most of the work, the
process's own processor time and bytes read and written count too.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator


@dataclasses.dataclass(frozen=True)
class Wait:
    """An operation that the main thread is inside of."""

    description: str
    """For an error message, for example `reading a batch`."""
    on_peers: bool
    """Whether it waits for other ranks, so that one of them causes a delay."""


@dataclasses.dataclass
class _State:
    count: int = 0
    depth_of_long_work: int = 0
    waits: list[Wait] = dataclasses.field(default_factory=list)
    sources: list[Callable[[], int]] = dataclasses.field(default_factory=list)


_state = _State()


def advance() -> None:
    """Count one finished piece of work."""
    _state.count += 1


def progress() -> tuple[int, ...]:
    """Return numbers that change with every piece of work of this process and of its helper processes."""
    return (_state.count, *(source() for source in list(_state.sources)))


@contextlib.contextmanager
def waiting_for(description: str, on_peers: bool = False) -> Iterator[None]:
    """Name the operation in the block; its start and end count as progress, unless it waits for other ranks."""
    wait = Wait(description, on_peers)
    _state.waits.append(wait)
    if not on_peers:
        advance()
    try:
        yield
    finally:
        _state.waits.remove(wait)
        if not on_peers:
            advance()


def current_wait() -> Wait | None:
    """Return the innermost block of `waiting_for` that the process is in; None outside of all."""
    waits = list(_state.waits)
    return waits[-1] if waits else None


@contextlib.contextmanager
def long_work(description: str) -> Iterator[None]:
    """In the block, processor time and bytes read and written count as progress: loading, building indexes."""
    _state.depth_of_long_work += 1
    try:
        with waiting_for(description):
            yield
    finally:
        _state.depth_of_long_work -= 1


def in_long_work() -> bool:
    """Return whether the process is inside `long_work`."""
    return _state.depth_of_long_work > 0


@contextlib.contextmanager
def counting(source: Callable[[], int]) -> Iterator[None]:
    """In the block, count `source()` as progress too: a number that grows with another process's work."""
    _state.sources.append(source)
    try:
        yield
    finally:
        _state.sources.remove(source)
