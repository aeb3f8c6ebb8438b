"""Results for people and machines: terminal, JSON, one-file HTML."""
