"""Results back to NumPy: the collector, its stores, scalars.

Imports `bridge` and `device`; nothing but the public interface imports it.
"""
