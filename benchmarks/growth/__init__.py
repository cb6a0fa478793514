"""Parts of benchmarks/world_growth.py: what each grows with."""
