"""The tables and pictures that `scripts/results.py` makes of the CSV files in docs/results."""
