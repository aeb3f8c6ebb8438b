"""The embedded tritonserver, its Python-based backends, and the model-control client."""
