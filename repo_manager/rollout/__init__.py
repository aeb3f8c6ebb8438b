"""Putting a version into service: look, check, apply, prove, finish, or undo.

The verbs are in `deploy.py`; the one engine that runs them in `engine.py`; its targets in `targets/`: Triton servers,
Kubernetes, KServe. On trial beside the old version: `trial/`. `plan.py` and `prediction/` predict the effect of a load
on each version.

Its modules are imported by their own names: `status` does not wait for the engine.
"""
