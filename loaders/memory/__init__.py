"""Batch memory: one arena per pool, blocks with a life cycle, leases, and what forked children and devices still read.

Imports `errors` and `system`; batches, workers, the DataLoader and the device side import it.
"""
