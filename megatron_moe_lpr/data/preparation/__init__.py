"""Data preparation, offline: download, preprocess, merge and inspect indexed datasets of one language each."""
