"""Whoever does the work: messages, the worker, and three engines (inline, threads, processes) behind one protocol.

Imports `batch`, `datasets.wrapped` and what stands before them, never torch; only the DataLoader imports it.
"""
