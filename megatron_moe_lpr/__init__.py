"""MoE-LPR on Megatron-Core: multilingual extension of a dense language model (arXiv 2408.11396)."""

import warnings

__version__ = "0.1.0"

# megatron-core says at every import what it does without NVIDIA's libraries. Where they are needed, the CUDA platform
# checks for them by name.
for _message in (".*Apex.*not installed", ".*Transformer Engine.*not installed", "`load_state_dict` is deprecated"):
    warnings.filterwarnings("ignore", message=_message)
