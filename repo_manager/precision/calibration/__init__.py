"""Calibration data: read, checked, and the ranges that INT8 scales are made from."""
