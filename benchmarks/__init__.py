"""Benchmarks: every figure that the documents give, and the commands that make it."""
