"""Searches the best configuration of a model, on a copy of it, and proves it better than today's.

Its modules are imported by their own names.
"""
