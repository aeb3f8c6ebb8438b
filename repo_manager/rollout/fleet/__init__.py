"""The same roll-out on several servers (`deploy.py`): which (`targets.py`), and how many at a time (`waves.py`)."""
