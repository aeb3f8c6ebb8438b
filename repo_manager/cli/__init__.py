"""The command line: one module a noun. Parse, call, render."""
