"""How tensors are rearranged, inserted, added for a stock architecture, and summed up in a fingerprint."""
