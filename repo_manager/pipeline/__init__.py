"""Composes the stages. No logic of its own.

Its modules are imported by their own names: a command that needs one of them does not wait for the others.
"""
