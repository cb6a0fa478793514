"""The model: built of three rooms.

moe/            the MoE layer, its router and their losses, experts, statistics
configuration/  from a Hugging Face configuration and the flags to Megatron's: sizes, kernels, FP8, recompute
transformer/    parts of the dense transformer: attention, norm, rotary embedding
"""
