"""Ranks on the device or on the CPU platform beside it, a pool of processes for each kind and size.

The test process itself never touches a device.
"""

import contextlib
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tests.distributed import RankPool, _serve
from tests.emulation.start import processes_on_the_device
from tests.gpu.device import EMULATED, LOCAL


def _serve_cuda(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    _serve(rank, world_size, port, pipe, "cuda")


def _serve_local(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    # On the emulated device Transformer Engine is missing there, which chooses the local layers.
    _serve(rank, world_size, port, pipe, "cuda", None if EMULATED else "local")


_SERVERS = {"cuda": _serve_cuda, "local": _serve_local, "cpu": _serve}
_pools: dict[tuple[str, int], RankPool] = {}


def ranks(world_size: int, platform: str = "cuda") -> RankPool:
    """The session's pool of this kind and size, started on first use and again after a failure. `local` is the device
    without Transformer Engine, as `cuda` is where this session has none."""
    kind = "local" if platform == "cuda" and LOCAL else platform
    key = (kind, world_size)
    if key not in _pools or not all(process.is_alive() for process in _pools[key].processes):
        with processes_on_the_device(kind != "local") if EMULATED else contextlib.nullcontext():
            # A fork of a process that has imported Transformer Engine would find it.
            _pools[key] = RankPool(world_size, _SERVERS[kind], preloaded=not EMULATED or kind != "local")
    return _pools[key]


def run(world_size: int, function: Callable[..., Any], *arguments: Any, platform: str = "cuda") -> list[Any]:
    """Call `function(*arguments)` on every rank, as the first model of its process."""
    return ranks(world_size, platform).run(_first_model, function, *arguments)


def _first_model(function: Callable[..., Any], *arguments: Any) -> Any:
    """Transformer Engine's list of tensors with delayed scaling lives as long as the process, and would go on reducing
    those of the models before, in groups that are gone."""
    if "transformer_engine.pytorch" in sys.modules:
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
    return function(*arguments)


def close() -> None:
    """End every pool, with each file: the threads of all groups a rank has been in stay."""
    for pool in _pools.values():
        pool.close()
    _pools.clear()
