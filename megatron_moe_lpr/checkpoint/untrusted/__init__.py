"""Reading of untrusted pickles in checkpoints, without importing or calling anything that they name.

Readers use three functions: `parse_metadata` for the index, `load_part` and `load_file` for what torch.save wrote, and
`check_extra_states` for Transformer Engine's states.
"""
