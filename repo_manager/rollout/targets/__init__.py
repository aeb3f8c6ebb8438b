"""A roll-out through Kubernetes (`kubernetes.py`), KServe (`kserve.py`) or a gateway's weights (`gateway.py`)."""
