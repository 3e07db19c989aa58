"""The sub-commands of analyze.py: one module for each question, with what they share in `common.py`."""
