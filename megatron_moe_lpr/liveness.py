"""Progress of this process: counted where work gets done, read by whoever watches for a process that hangs.

Progress is a micro-batch read, computed or evaluated, an optimizer step, a block of a file read, written or compared
with its checksum, a dataset or index map built, and what another process writes for this one. Waiting is none, whether
in a collective, for a loader process or for a disk. Inside `long_work`, where libraries do most of the work, the
process's own processor time and bytes read and written count too.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator


@dataclasses.dataclass(frozen=True)
class Wait:
    """What the main thread is busy with."""

    description: str
    """For an error message, for example `reading a batch`."""
    on_peers: bool
    """Whether it waits for other ranks, so that the reason for a delay lies with one of them."""


@dataclasses.dataclass
class _State:
    count: int = 0
    depth_of_long_work: int = 0
    waits: list[Wait] = dataclasses.field(default_factory=list)
    sources: list[Callable[[], int]] = dataclasses.field(default_factory=list)


_state = _State()


def advance() -> None:
    """Count a piece of work that is done."""
    _state.count += 1


def progress() -> tuple[int, ...]:
    """Numbers that change with every piece of work, of this process and of those that work for it."""
    return (_state.count, *(source() for source in list(_state.sources)))


@contextlib.contextmanager
def waiting_for(description: str, on_peers: bool = False) -> Iterator[None]:
    """Name what the block does; both ends of the block count as progress, unless it waits for other ranks."""
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
    """The innermost block of `waiting_for` that the process is in."""
    waits = list(_state.waits)
    return waits[-1] if waits else None


@contextlib.contextmanager
def long_work(description: str) -> Iterator[None]:
    """A block in which processor time and bytes read and written count as progress: loading, building indexes."""
    _state.depth_of_long_work += 1
    try:
        with waiting_for(description):
            yield
    finally:
        _state.depth_of_long_work -= 1


def in_long_work() -> bool:
    """Whether the process is inside `long_work`."""
    return _state.depth_of_long_work > 0


@contextlib.contextmanager
def counting(source: Callable[[], int]) -> Iterator[None]:
    """Inside the block `source`, a number that grows with work done elsewhere, counts as progress too."""
    _state.sources.append(source)
    try:
        yield
    finally:
        _state.sources.remove(source)
