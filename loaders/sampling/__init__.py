"""Positions in an epoch to indices of samples: computed, never stored, and the same on any number of ranks.

Imports `randomness` and the dataset protocol; the DataLoader imports it.
"""
