"""perf_analyzer: installing it, driving it, reading its files."""
