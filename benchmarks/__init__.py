"""Benchmarks: the commands that produce every figure in the documentation."""
