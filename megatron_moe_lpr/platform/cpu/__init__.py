"""megatron-core on CPUs over gloo.

Megatron assumes CUDA in places. The modules here answer those few calls on the CPU, each replacement with the
Megatron place that needs it. Installed only when the CPU platform is chosen, once per process.
"""

import os

# oneDNN keeps the kernels it compiled for the last 1,024 shapes and torch their operands' layouts. Experts get another
# number of tokens in each step, so that memory grows by gigabytes, and steps take longer.
CACHED_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}

_installed = False


def install() -> None:
    """Make megatron-core run unmodified on this machine's CPU."""
    global _installed
    if _installed:
        return
    for variable, capacity in CACHED_SHAPES.items():
        os.environ.setdefault(variable, capacity)
    from megatron_moe_lpr.platform.cpu import collectives, devices, streams

    streams.install()
    devices.install()
    collectives.install()
    # Last, because it imports megatron-core, which reads torch.cuda while being imported.
    from megatron_moe_lpr.platform.cpu import (
        activations,
        cross_entropy,
        expert_rows,
        gradient_buffer,
        internals,
        optimizer,
        permutation,
        rotary,
    )

    for module in (
        internals,
        optimizer,
        gradient_buffer,
        activations,
        cross_entropy,
        permutation,
        expert_rows,
        rotary,
    ):
        module.install()
    _installed = True
