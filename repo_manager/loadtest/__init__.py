"""Load on a served model: arrival schedules, clients, measurements, verdicts.

Import from the modules: `run` and `compare` start a load test, `options` are what goes in, `result` what comes out. No
name is imported here: every load worker reads this file and must stay small.
"""
