"""The --save directory of a run: its lock, its start, and the checkpoint to resume from."""
