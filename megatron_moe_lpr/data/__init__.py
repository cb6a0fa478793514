"""Data: text to language-tagged indexed datasets, and batches that carry the tags.

Preprocessing needs no torch: its modules (tokenizer, sources, documents, indexed, manifest, preprocessing, merging)
import none, so that worker processes start fast.
"""
