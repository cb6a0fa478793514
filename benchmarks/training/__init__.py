"""Candidates and the floor of bench_training.py."""
