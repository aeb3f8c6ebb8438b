"""A new version beside the old one: mirrored requests (`mirror.py`), or a growing share of them (`canary.py`)."""
