"""Calibration data: read, checked, and the ranges behind INT8 scales."""
