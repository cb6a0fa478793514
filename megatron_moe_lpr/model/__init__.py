"""The model: Hugging Face families as Megatron configurations, the MoE layer, the router, the build."""
