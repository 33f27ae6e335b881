"""From samples to a batch: its spec, samples written into rows, values packed for the way between processes, tensors.

Imports `memory` and what stands before it; datasets do not import it, workers and the DataLoader do.
"""
