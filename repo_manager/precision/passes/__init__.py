"""Passes from one draft to the next: each states its requirements and its guarantees."""
