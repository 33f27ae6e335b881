"""The workers: messages, the worker itself, and three engines (inline, threads, processes) with one protocol.

Imports `batch`, `datasets.wrapped` and the layers below them, never torch; only the DataLoader imports it.
"""
