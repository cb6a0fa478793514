"""Megatron-Core as a dependency: what differs between its versions, and a check of all that is put in its place."""
