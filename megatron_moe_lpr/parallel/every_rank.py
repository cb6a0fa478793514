"""Work that must succeed on every rank: returns the results of all ranks, or raises on all."""

import dataclasses
import socket
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_moe_lpr.errors import DamagedFile, UserError

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class _Failure:
    """The error of a rank."""

    rank: int
    host: str
    error: UserError

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.error}"


def on_every_rank(action: Callable[[], Result]) -> list[Result]:
    """Run `action` on every rank and return all results in rank order. Every rank must call it; without process groups
    the result is this process's alone.

    Raises:
        DamagedFile: on every rank: some rank raised it, and no rank failed otherwise.
        UserError: on every rank: the error of a rank, with its number and host unless all raised the same message.
        Exception: an error of this rank that is a defect; the other ranks raise a UserError that names this rank.
    """
    result, caught = None, None
    try:
        result = action()
    except Exception as error:  # any error: the other ranks wait for this one
        caught = error
    outcomes = _gathered((result, caught and _Failure(_rank(), socket.gethostname(), _as_user_error(caught))))
    failures = [failure for _, failure in outcomes if failure]
    if caught is not None and not isinstance(caught, UserError | OSError):
        raise caught
    if failures:
        raise _common_error(failures, len(outcomes))
    return [value for value, _ in outcomes]


def on_rank_0(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 and return its result on every rank. Every rank must call it. Errors: `on_every_rank`."""
    return on_every_rank(lambda: action() if _rank() == 0 else None)[0]  # type: ignore[return-value]


def _common_error(failures: list[_Failure], world_size: int) -> UserError:
    # A rank that could not read a file outweighs one that found damage: the damage is not proven then.
    unreadable = [failure for failure in failures if not isinstance(failure.error, DamagedFile)]
    chosen = (unreadable or failures)[0]
    if not unreadable:
        return chosen.error
    same = len(failures) == world_size and len({str(failure.error) for failure in failures}) == 1
    return chosen.error if same else UserError(str(chosen))


def _as_user_error(error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.strerror:
        return UserError(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return UserError(f"{type(error).__name__}: {error}")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gathered(value: tuple) -> list[tuple]:
    if not dist.is_initialized():
        return [value]
    values: list[tuple] = [()] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
