"""Hugging Face checkpoints <-> Megatron checkpoints, tensor by tensor: import, upcycling, export, more experts.

tensors/        names and shapes on both sides, and what new tensors begin with
hugging_face/   files in Hugging Face's forms: configuration, safetensors, model card, adapter
verification/   whether two models are the same, and what a checkpoint holds
"""
