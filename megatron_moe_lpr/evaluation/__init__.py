"""Evaluation of a model: loss and routing of each language."""
