"""To the device: batches move while the model computes on the one before, and are finished there.

Imports the DataLoader and what stands before it; `outputs` and the command line import it.
"""
