"""What a load will do to every version of a model: Triton's reload rules (`rules.py`), and the facts they need."""
