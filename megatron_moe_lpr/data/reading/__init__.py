"""From indexed datasets to micro-batches with a language tag per token: blends, samples, data-parallel order."""
