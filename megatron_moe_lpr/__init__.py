"""MoE-LPR on Megatron-Core: multilingual extension of a dense language model (arXiv 2408.11396)."""

__version__ = "0.1.0"
