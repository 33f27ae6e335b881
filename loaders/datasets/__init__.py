"""Datasets: an index in, a sample of ndarrays, scalars and strings out. NumPy only; any DataLoader can read them.

Imports `images` and what stands before it; workers and the DataLoader import `wrapped` to look into the user's dataset.
"""
