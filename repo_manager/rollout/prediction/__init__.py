"""The effect of a load on every version of a model: Triton's reload rules (`rules.py`), and the facts they need."""
