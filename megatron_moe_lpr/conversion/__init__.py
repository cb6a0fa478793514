"""Hugging Face checkpoints <-> Megatron checkpoints, tensor by tensor: import, upcycling, export, expansion.

tensors/        query, key and value; inserted blocks; tensors that only stock architectures have; the fingerprint
hugging_face/   files in Hugging Face's forms: configuration, safetensors, model card, adapter
verification/   whether two models compute the same, and what a checkpoint holds
"""
