"""The command line: one module a noun; parse, call, render."""
