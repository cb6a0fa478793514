"""Checkpoints in Megatron's distributed format: what they know, where they lie, streaming reads and writes."""
