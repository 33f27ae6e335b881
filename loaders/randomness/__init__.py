"""Random numbers that belong to a sample: keyed streams, the process's generators, transforms with random state.

Imports only `errors` and `nested`; anything may import it.
"""
