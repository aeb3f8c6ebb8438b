"""What an operation would do, and whether it may: pure functions on a `ModelView`."""
