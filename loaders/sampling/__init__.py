"""Positions in an epoch to indices of samples: computed, never stored, and the same on any number of ranks."""

from loaders.sampling.mixture import Mixture as Mixture
from loaders.sampling.sharded import ShardedSampler as ShardedSampler
from loaders.sampling.weighted import WeightedSampler as WeightedSampler
