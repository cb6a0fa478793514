"""From a checkpoint on disk, checked first, to weights on this rank."""
