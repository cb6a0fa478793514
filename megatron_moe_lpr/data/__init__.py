"""Data: the dataset on disk, which `preparation` writes and `reading` makes batches of.

preparation/    text to language-tagged indexed datasets, offline
reading/        indexed datasets to batches that carry the tags, in training and evaluation

Preparation needs no torch, and what both packages share imports none, so that worker processes start fast.
"""
