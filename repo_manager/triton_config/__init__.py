"""Triton's config.pbtxt: derived from a model, read, written and checked."""
