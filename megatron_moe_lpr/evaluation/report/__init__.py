"""The report that compares evaluations: one HTML file that needs no other file."""
