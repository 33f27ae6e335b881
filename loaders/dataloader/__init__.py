"""The `DataLoader`: arguments, plan, epoch, dispatch, delivery, the sampler's cursor, error policies, checkpoints.

Imports everything before it; the device side, the benchmark and the doctor import it.
"""
