"""One step on one rank: micro-batches through the schedule, gradients, and what all ranks agree on."""
