"""Batches: the memory they lie in, and how samples get there."""
