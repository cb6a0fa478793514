"""Whether two models compute the same, and what a checkpoint holds."""
