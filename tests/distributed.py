"""Real gloo ranks for tests: processes that start once per session and run one function after another.

def check(value):                       # at module level: ranks import it by name
    return dist.get_rank() + value

assert rank_pool(2).run(check, 10) == [10, 11]
"""

import contextlib
import gc
import multiprocessing
import os
import random
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_SECONDS = 240
GRACE_SECONDS = 3
PRELOADED = ("megatron_moe_lpr.training.setup", "megatron_moe_lpr.evaluation.checkpoint", "transformers")
"""Imported once per session by the process that ranks are forked from, instead of once by each of them."""

OURS = r"(megatron_moe_lpr|tests|tools|benchmarks)\b"
"""Modules whose warnings are errors on ranks, as pyproject.toml makes them in the test process."""


class RankFailure(AssertionError):
    """A rank raised, died or hung."""


class RankPool:
    """`world_size` processes in one gloo world."""

    def __init__(self, world_size: int, serve: Callable[..., None] | None = None, preloaded: bool = True) -> None:
        """Start them.

        Args:
            serve: what each runs, by default `_serve`.
            preloaded: forked from a process that has imported the package; else they begin with nothing.
        """
        self.world_size = world_size
        context = multiprocessing.get_context("forkserver" if preloaded else "spawn")
        if preloaded:
            context.set_forkserver_preload(list(PRELOADED))
        port = free_port()
        self.processes, self.pipes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve or _serve, args=(rank, world_size, port, theirs))
            process.start()
            self.processes.append(process)
            self.pipes.append(ours)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` on every rank at once; the results in rank order."""
        for pipe in self.pipes:
            pipe.send((function, args))
        try:
            return self._collect()
        except RankFailure:
            self.close()
            raise

    def _collect(self) -> list[Any]:
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(results) < self.world_size and not errors:
            for rank in set(range(self.world_size)) - results.keys():
                if self.pipes[rank].poll(0.01):
                    kind, value = _receive(self.pipes[rank])
                    (results if kind == "result" else errors)[rank] = value
            if time.monotonic() > deadline:
                errors[-1] = (
                    f"no answer within {TIMEOUT_SECONDS} s from ranks {set(range(self.world_size)) - set(results)}"
                )
        if errors:
            raise RankFailure("\n".join(f"rank {rank}: {text}" for rank, text in errors.items()))
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the processes: politely, so that they end their own children, and else by force."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(timeout=GRACE_SECONDS)
            process.kill()
        if _pools.get(self.world_size) is self:
            del _pools[self.world_size]


_pools: dict[int, RankPool] = {}


def rank_pool(world_size: int) -> RankPool:
    """The session's pool of this size, started on first use."""
    if world_size not in _pools:
        _pools[world_size] = RankPool(world_size)
    return _pools[world_size]


def close_pools() -> None:
    """End every pool; called once when the test session ends."""
    for pool in list(_pools.values()):
        pool.close()


def _receive(pipe: Connection) -> tuple[str, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return "error", "the process died"


def free_port() -> int:
    """Below the ports that the system hands out: gloo takes these by the hundred, also between the look and the use."""
    for port in random.SystemRandom().sample(range(12_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port between 12000 and 32000")


def _serve(
    rank: int, world_size: int, port: int, pipe: Connection, platform: str = "cpu", layers: str | None = None
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["LOCAL_RANK"] = str(rank)
    warnings.filterwarnings("error", module=OURS)
    import torch

    torch.set_num_threads(1)
    from megatron_moe_lpr.parallel.groups import initialize_parallel
    from megatron_moe_lpr.parallel.layout import ParallelLayout
    from megatron_moe_lpr.platform import select_platform

    # Half a million objects of what has been imported: to look through them took half of a small test's time.
    gc.freeze()
    # With the largest TP that a test may ask for: it decides how kernels are launched.
    initialize_parallel(select_platform(platform, world_size, layers), ParallelLayout())
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        if task is None:
            return
        function, args = task
        try:
            pipe.send(("result", function(*args)))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
