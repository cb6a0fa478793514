"""The layout of a checkpoint directory, its card, and Megatron's torch_dist format read and written by tensor."""
