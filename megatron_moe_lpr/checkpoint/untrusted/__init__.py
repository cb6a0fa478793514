"""Pickles inside checkpoints that come from elsewhere, read without running anything in them."""
