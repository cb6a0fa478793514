"""megatron-core on CPUs over gloo.

Megatron assumes CUDA in places. Each module here replaces a few of those calls and names the Megatron file that makes
them. They are installed when the CPU platform is chosen, once per process.
"""

import os

# By default oneDNN keeps compiled kernels for the last 1,024 shapes, and torch the layouts of their operands. Experts
# get another number of tokens in each step, so that memory would grow by gigabytes and steps would take longer.
CACHED_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}

_installed = False


def install() -> None:
    """Make megatron-core run unmodified on this machine's CPU."""
    global _installed
    if _installed:
        return
    for variable, capacity in CACHED_SHAPES.items():
        os.environ.setdefault(variable, capacity)
    from megatron_moe_lpr.platform.cpu import collectives, devices, memory, streams

    memory.keep_freed_memory()
    streams.install()
    devices.install()
    collectives.install()
    # Last, because it imports megatron-core, which reads torch.cuda while being imported.
    from megatron_moe_lpr.platform.cpu import expert_rows, gradient_buffer, internals
    from megatron_moe_lpr.platform.torch_only import optimizer, swiglu

    for module in (internals, optimizer, gradient_buffer, expert_rows):
        module.install()
    swiglu.install(swiglu.CHUNK_ON_CPUS)
    _installed = True
