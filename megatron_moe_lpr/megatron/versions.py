"""What differs between megatron-core 0.16.1 and 0.19, each with the version that made the difference.

No other module of this package asks for the version of megatron-core. What is only one argument more or less is no
entry here: such functions take and pass on whatever Megatron gives them.
"""

import functools
from importlib import metadata
from typing import Any

from packaging.version import Version

from megatron_moe_lpr.errors import UserError

FIRST, END = Version("0.16.1"), Version("0.20")


@functools.cache
def installed_version() -> Version:
    """Version of the installed megatron-core.

    Raises:
        UserError: none is installed, or one that this package does not know.
    """
    try:
        found = Version(metadata.version("megatron-core"))
    except metadata.PackageNotFoundError:
        raise UserError("megatron-core is not installed; pip install it with this package") from None
    if not FIRST <= found < END:
        raise UserError(f"megatron-core {found} is installed; pip install 'megatron-core>={FIRST},<{END}'")
    return found


def _since(release: str) -> bool:
    return installed_version() >= Version(release)


def without_cuda_graphs() -> dict[str, Any]:
    """The field of TransformerConfig that turns CUDA graphs off; its old name is a DeprecationWarning.

    0.18: `cuda_graph_scope` became `cuda_graph_modules`.
    """
    return {"cuda_graph_modules" if _since("0.18") else "cuda_graph_scope": []}


def shares_recomputed_storage() -> bool:
    """Whether tensor_parallel/random.py has `_get_share_storage`, which compiles C++ at run time.

    0.17: CheckpointWithoutOutput no longer copies the recomputed values into the memory of the old ones.
    """
    return _since("0.17")


def scales_by_tensors() -> bool:
    """Whether optimizer/clip_grads.py has `multi_tensor_scale_tensor_impl`, which takes the norm as a tensor (0.17)."""
    return _since("0.17")


def permutes_with_padding() -> bool:
    """Whether moe/moe_utils.py `permute` also returns the offsets of padding and the padded counts (0.17)."""
    return _since("0.17")


def strategy_options() -> dict[str, Any]:
    """Arguments of TorchDistLoadShardedStrategy.

    0.19: by default weights are rounded to FP8 while they are read (`stream_ckpt_dequant`). The optimizer's fp32
    weights would start from the rounded ones.
    """
    return {"stream_ckpt_dequant": False} if _since("0.19") else {}


def reads_on_its_own() -> bool:
    """Whether a rank that cannot read its part fails alone, and the others wait for it.

    0.18: TorchDistLoadShardedStrategy reads with `no_dist=True`; before, torch let all ranks know.
    """
    return _since("0.18")


def has_common_strategies() -> bool:
    """Whether `dist_checkpointing.load` takes a strategy for common.pt; later a function reads it.

    0.17: `serialization.load` calls `load_common`. 0.19: it calls `load_common_state_dict`, see `common_reader`.
    """
    return not _since("0.17")


def common_reader() -> str:
    """Name, in dist_checkpointing/serialization.py, of the function by which `load` reads common.pt (from 0.17 on)."""
    return "load_common_state_dict" if _since("0.19") else "load_common"
