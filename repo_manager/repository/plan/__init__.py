"""The effect of an operation, and whether it is allowed: pure functions on a `ModelView`."""
