"""From a Hugging Face configuration and the flags to Megatron's configuration: sizes, kernels, FP8, recompute."""
