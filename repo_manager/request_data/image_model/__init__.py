"""Images as a model's input: the one transformation, and the Triton model for it."""
