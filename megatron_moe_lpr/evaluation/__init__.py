"""What a model knows, measured: logits, losses per language, routing."""
