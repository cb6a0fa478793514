"""A GPU that is not there, for rehearsals: Megatron takes the paths of GPUs and NCCL, and tensors lie in host memory.

Layers are those of PyTorch alone, as on GPUs without Transformer Engine. Nothing here can train: the caller replaces
the collectives (`rehearsal/recorder.py`), and mostly computes nothing either (`rehearsal/sizes_only.py`).
"""

import torch

from megatron_moe_lpr import platform
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.megatron.overriding import replace
from megatron_moe_lpr.platform import GPUFacts, Platform

BACKEND = "fake"
"""torch's process group without communication; its groups exist as soon as they are asked for."""
FACTS = GPUFacts(capability=(9, 0), cuda=(12, 8), transformer_engine=None, grouped_products=True)
"""An H100 with a PyTorch that multiplies the matrices of several experts in one launch."""
_simulated: Platform | None = None


def select_simulated() -> Platform:
    """Choose the simulated GPU for this process.

    Raises:
        UserError: the process has chosen another platform before.
    """
    global _simulated
    if _simulated is None:
        if platform._selected is not None:
            raise UserError(
                f"a rehearsal needs a process of its own: this one already runs on {platform._selected.name}"
            )
        _install()
        _simulated = Platform("cuda", "nccl", torch.device("cpu"), transformer_engine=False, gpu=FACTS)
        platform._selected = _simulated
    return _simulated


def _install() -> None:
    import megatron_moe_lpr.platform.cpu.devices as devices
    import megatron_moe_lpr.platform.cpu.streams as streams

    streams.install()
    devices.install()
    replace(torch.Tensor, pin_memory=lambda self, *args, **kwargs: self)
    # After the two above, because they import megatron-core, which reads torch.cuda while being imported.
    from megatron_moe_lpr.platform import torch_only
    from megatron_moe_lpr.platform.cpu import internals

    internals.install()
    torch_only.install()
