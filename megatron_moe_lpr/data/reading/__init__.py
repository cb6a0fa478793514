"""Indexed datasets to batches that carry language tags: blends, samples, who reads which of them."""
