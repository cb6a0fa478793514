"""What lies where in a checkpoint directory, and Megatron's torch_dist format one tensor at a time."""
