"""Files in Hugging Face's forms, read and written: configuration, safetensors, model card, adapter."""
