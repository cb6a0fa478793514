"""The language groups that routing, losses and scores are averaged over."""

# Without torch, for commands that do without it.
LANGUAGE_GROUPS = ("original", "expanded")
"""Languages of the dense model, and languages that new experts were added for."""
