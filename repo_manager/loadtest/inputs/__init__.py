"""Input data of requests."""
