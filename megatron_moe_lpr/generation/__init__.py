"""Text from a checkpoint or an export: prompts, sampling, streaming."""
