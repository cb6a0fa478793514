"""Atomic output files and directories, checksums, locks, symbolic links and JSON files."""
