"""Triton model configurations: config.pbtxt read, derived, compared and changed, always through protobuf."""
