"""Hugging Face checkpoints <-> Megatron checkpoints, tensor by tensor: import, upcycling, export, verification."""
