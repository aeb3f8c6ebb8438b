"""Suites for the safety of a repository whoever dies or writes beside it: over folders and over objects.

Each is a script, `python -m support.repository_suites.NAME`: it forks, and so has a process without pytest's threads.
"""
