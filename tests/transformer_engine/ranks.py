"""Ranks with and without Transformer Engine: Megatron decides while it is imported, so each kind has its own processes.

Both run on the CPU platform's replacements over gloo. They exchange checkpoints and plain tensors.
"""

import dataclasses
from multiprocessing.connection import Connection

from tests.distributed import RankPool, _serve
from tests.emulation import extension


def _serve_with_transformer_engine(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    extension.install(with_kernels=False)
    _serve(rank, world_size, port, pipe)


def _serve_without(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    extension.block()
    _serve(rank, world_size, port, pipe)


_SERVERS = {True: _serve_with_transformer_engine, False: _serve_without}
_pools: dict[tuple[bool, int], RankPool] = {}


def ranks(transformer_engine: bool, world_size: int) -> RankPool:
    """The session's pool of this kind and size, started on first use and again after a failure."""
    key = (bool(transformer_engine), world_size)
    if key not in _pools or not all(process.is_alive() for process in _pools[key].processes):
        _pools[key] = RankPool(world_size, _SERVERS[bool(transformer_engine)], preloaded=False)
    return _pools[key]


def close() -> None:
    """End every pool; called once when the test session ends."""
    for pool in _pools.values():
        pool.close()
    _pools.clear()


def platform_of_this_rank():
    """In a rank: the platform whose layers this kind of rank builds.

    With Transformer Engine: its layers, on the CPU, as if the device were an H100.
    """
    from megatron_moe_lpr.platform import GPUFacts, select_platform

    platform = select_platform("cpu")
    if not extension.is_installed():
        return platform
    from packaging.version import Version

    from tests.transformer_engine import device

    device.install()
    facts = GPUFacts(device.CAPABILITY, (13, 0), Version(extension.version()))
    return dataclasses.replace(platform, transformer_engine=True, gpu=facts)
