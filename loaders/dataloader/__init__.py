"""The `DataLoader`: arguments, plan, epoch, dispatch, delivery, the sampler's cursor, error policies, checkpoints.

May import every package before it in the map of `docs/design.md`; `device`, `benchmark` and `doctor` import it.
"""
