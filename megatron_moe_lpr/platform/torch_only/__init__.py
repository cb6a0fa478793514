"""What Megatron needs replaced to run on PyTorch alone, without Transformer Engine and apex.

`optimizer` and `recompute` are installed on the CPU platform too, which has a SwiGLU of its own.
"""


def install() -> None:
    """Let Megatron on a GPU use PyTorch alone, also where Transformer Engine or apex is installed."""
    from megatron_moe_lpr.platform.torch_only import optimizer, recompute, swiglu

    for module in (recompute, swiglu, optimizer):
        module.install()
