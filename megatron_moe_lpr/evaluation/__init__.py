"""What a model knows, measured: losses per language, routing."""
