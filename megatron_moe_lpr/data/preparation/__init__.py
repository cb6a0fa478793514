"""Text to language-tagged indexed datasets, offline: what tools/download_data.py to tools/inspect_data.py do."""
