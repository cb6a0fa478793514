"""The two groups of languages that routing is told for."""

# Apart from model/moe/routing_statistics.py, for tools that do without torch.
GROUPS = ("original", "expanded")
