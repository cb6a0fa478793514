"""Verification of a checkpoint, and loading of its weights on every rank, at any layout."""
