"""Datasets: an index in, a sample of ndarrays, scalars and strings out. NumPy only; any DataLoader can read them.

Imports `images` and the packages before it; workers and the DataLoader import `wrapped` to inspect the user's dataset.
"""
