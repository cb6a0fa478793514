"""MoE-LPR on Megatron-Core: multilingual extension of a dense language model (arXiv 2408.11396)."""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_moe_lpr.api import Callback, UserError, evaluate, export, generate, plan, preprocess, train, upcycle

__all__ = ["Callback", "UserError", "evaluate", "export", "generate", "plan", "preprocess", "train", "upcycle"]
__version__ = "0.1.0"

# megatron-core warns at every import that NVIDIA's libraries are missing. The CUDA platform checks for those it needs.
for _message in (".*Apex.*not installed", ".*Transformer Engine.*not installed", "`load_state_dict` is deprecated"):
    warnings.filterwarnings("ignore", message=_message)


def __getattr__(name: str) -> Any:
    """Import the Python API when one of its names is first used, so that `import megatron_moe_lpr` takes no time."""
    if name in __all__:
        return getattr(importlib.import_module("megatron_moe_lpr.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
