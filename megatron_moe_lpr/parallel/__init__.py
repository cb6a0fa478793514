"""How the ranks share the model and the data."""
