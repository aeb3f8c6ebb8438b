"""A new version beside the old one: mirrored requests (`shadow.py`), or a growing share of them (`canary.py`)."""
