"""The page that compares evaluations: one self-contained HTML file, drawn without any library."""
