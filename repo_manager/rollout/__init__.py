"""Putting a version into service: plan, apply, verify, undo."""
