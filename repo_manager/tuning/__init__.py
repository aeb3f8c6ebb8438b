"""Searches the configuration of a model that serves best, on a copy of it, and proves that it is better than today's.

Its modules are imported by their own names.
"""
