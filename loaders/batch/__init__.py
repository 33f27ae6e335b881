"""From samples to a batch: its spec, samples written into rows, values packed for other processes, tensors.

Imports `memory` and the layers below it; datasets do not import it, workers and the DataLoader do.
"""
