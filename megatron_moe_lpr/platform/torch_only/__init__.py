"""What Megatron needs replaced to run on PyTorch alone, without Transformer Engine and apex.

All of it is installed on the CPU platform too, SwiGLU in chunks of rows.
"""


def install() -> None:
    """Let Megatron on a GPU use PyTorch alone, also where Transformer Engine or apex is installed."""
    from megatron_moe_lpr.platform.torch_only import optimizer, recompute, swiglu

    for module in (recompute, swiglu, optimizer):
        module.install()
