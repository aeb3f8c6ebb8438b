"""Requests from files, the same for load tests and for trials: read, checked, and never altered."""
