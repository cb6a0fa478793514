"""Work that must succeed on every rank, and small values that ranks exchange.

No function here sends the values of all ranks to all ranks: a world of N ranks would send N x N of them. What every
rank gets has one size, whatever the world's: a number, or the value of one rank. The values of all ranks come together
on rank 0 alone (`gather_on_rank_0`, `decide_on_rank_0`).
"""

import dataclasses
import socket
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_moe_lpr.errors import DamagedFile, UserError
from megatron_moe_lpr.platform.collectives import collective_device

Value = TypeVar("Value")
Result = TypeVar("Result")

UNREADABLE, DAMAGED, INTACT = range(3)
"""A rank's state after an action. The error of the lowest state is raised on all ranks."""


@dataclasses.dataclass(frozen=True)
class _Failure:
    """The error of a rank."""

    rank: int
    host: str
    error: UserError

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.error}"


def on_every_rank(action: Callable[[], Result]) -> Result:
    """Run `action` on every rank and return this rank's result. Every rank must call it.

    Where no rank fails, the ranks exchange a single number.

    Raises:
        DamagedFile: on every rank: some rank raised it, and no rank failed otherwise.
        UserError: on every rank: the error of a rank, with its number and host unless all raised the same message.
        Exception: an error of this rank that is a defect; the other ranks raise a UserError that names this rank.
    """
    result, caught = _attempt(action)
    failure = _as_failure(caught)
    # A rank that could not read a file outweighs one that found damage: the damage is not proven then.
    state = INTACT if failure is None else DAMAGED if isinstance(failure.error, DamagedFile) else UNREADABLE
    lowest = _lowest(state * _world_size() + _rank())
    if lowest < INTACT * _world_size():
        chosen: _Failure = _broadcast(failure, lowest % _world_size())  # type: ignore[assignment]
        same = _lowest(int(failure is not None and str(failure.error) == str(chosen.error)))
        _raise_defect(caught)
        raise chosen.error if lowest >= _world_size() or same else UserError(str(chosen))
    return result  # type: ignore[return-value]


def on_rank_0(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 and return its result on every rank. Every rank must call it. Errors: `on_every_rank`."""
    result, caught = _attempt(action) if _rank() == 0 else (None, None)
    result, failure = _broadcast((result, _as_failure(caught)), 0)
    _raise_defect(caught)
    if failure is not None:
        alone = isinstance(failure.error, DamagedFile) or _world_size() == 1
        raise failure.error if alone else UserError(str(failure))
    return result  # type: ignore[return-value]


def gather_on_rank_0(value: Value) -> list[Value] | None:
    """Return the values of all ranks in rank order on rank 0; None on the others. Every rank must call it."""
    if _world_size() == 1:
        return [value]
    values: list[Value] | None = [value] * _world_size() if _rank() == 0 else None
    dist.gather_object(value, values)
    return values


def decide_on_rank_0(value: Value, decide: Callable[[list[Value]], Result]) -> Result:
    """Return on every rank what `decide` makes on rank 0 of the values of all ranks. Every rank must call it.

    Errors of `decide`: as `on_every_rank`.
    """
    values = gather_on_rank_0(value)
    return on_rank_0(lambda: decide(values or []))


def first_on_any_rank(value: Value | None) -> tuple[int, Value] | None:
    """Return the lowest rank whose value is not None, and its value, on every rank; None: all are. Every rank must call
    it. Where all are None, the ranks exchange a single number."""
    rank = _lowest(_world_size() if value is None else _rank())
    return None if rank == _world_size() else (rank, _broadcast(value, rank))  # type: ignore[return-value]


def union_of_ranks(names: Sequence[str], own: Collection[str]) -> set[str]:
    """Return those of `names`, the same list on every rank, that are in `own` of any rank. Every rank must call it.

    The ranks exchange one byte for each name.
    """
    if _world_size() == 1 or not names:
        return set(names).intersection(own)
    marks = torch.tensor([name in own for name in names], dtype=torch.uint8, device=collective_device())
    dist.all_reduce(marks, op=dist.ReduceOp.MAX)
    return {name for name, mark in zip(names, marks.tolist(), strict=True) if mark}


def _attempt(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:  # any error: the other ranks wait for this one
        return None, error


def _as_failure(error: Exception | None) -> _Failure | None:
    return None if error is None else _Failure(_rank(), socket.gethostname(), _as_user_error(error))


def _as_user_error(error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.strerror:
        return UserError(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return UserError(f"{type(error).__name__}: {error}")


def _raise_defect(error: Exception | None) -> None:
    if error is not None and not isinstance(error, UserError | OSError):
        raise error


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _lowest(number: int) -> int:
    """The lowest of all ranks' numbers."""
    if _world_size() == 1:
        return number
    numbers = torch.tensor([number], device=collective_device())
    dist.all_reduce(numbers, op=dist.ReduceOp.MIN)
    return int(numbers.item())


def _broadcast(value: Value, source: int) -> Value:
    """The value of rank `source`."""
    if _world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=source)
    return values[0]
