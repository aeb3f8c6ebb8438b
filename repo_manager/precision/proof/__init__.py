"""The proof a candidate needs before it is written, and the origin of its drift."""
