"""Putting a version into service: look, check, apply, prove, finish, or undo.

The verbs are in `deploy.py`; the one engine that runs them in `engine.py`; what it rolls out to in `targets/`: Triton
servers, Kubernetes, KServe. On trial beside the old version: `trial/`. What a load will do to each version: `plan.py`
and `prediction/`.

Its modules are imported by their own names: `status` does not wait for the engine.
"""
