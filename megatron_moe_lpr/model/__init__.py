"""The model, in three packages:

moe/            the MoE layer, its router and their losses, experts, statistics
configuration/  config.json, the parameters by shape and kind, Megatron's configuration: kernels, FP8, recompute
transformer/    parts of the dense transformer: attention, norm, rotary embedding
"""
