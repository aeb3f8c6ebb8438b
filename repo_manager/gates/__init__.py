"""The gate language: a limit on a number (`p99<20ms`), how it is read, and what an interval says of it."""
