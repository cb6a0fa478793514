"""Names and shapes of tensors on both sides, how they are rearranged, and what new ones begin with."""
