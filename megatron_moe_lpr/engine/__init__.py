"""One training step: micro-batches through Megatron's schedule, gradients, and the optimizer."""
