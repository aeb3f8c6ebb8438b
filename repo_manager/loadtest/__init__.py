"""Load on a served model: arrival schedules, clients, measurements, verdicts.

Import from the modules: `run` and `compare` start a load test, `options` is the input, `result` the output. No name is
imported here: every load worker reads this file and must stay small.
"""
