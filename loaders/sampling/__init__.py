"""Maps positions in an epoch to sample indices: computed, never stored, and the same on any number of ranks.

Imports `randomness` and the dataset protocol; the DataLoader imports it.
"""
