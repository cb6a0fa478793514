"""Hugging Face directories, read and written: configuration, safetensors, tokenizer, model card, adapter."""
