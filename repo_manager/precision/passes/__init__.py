"""Passes from one draft to the next: each states what it requires and what it ensures."""
