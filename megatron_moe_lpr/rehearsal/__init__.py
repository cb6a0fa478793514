"""A run rehearsed rank by rank in one process: nothing is computed by the ranks together, everything is recorded."""
