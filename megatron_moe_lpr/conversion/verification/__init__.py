"""Whether two models are the same, whether frozen weights still are, and what a checkpoint holds."""
