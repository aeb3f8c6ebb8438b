"""Composes the stages. No logic of its own.

Its modules are imported by their own names: a command with need of one does not wait for the others.
"""
