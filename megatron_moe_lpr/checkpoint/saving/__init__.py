"""From a training run to a checkpoint on disk, beside the training."""
