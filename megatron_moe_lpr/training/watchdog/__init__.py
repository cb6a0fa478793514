"""Ends a run that hangs, and says which rank hangs where."""
