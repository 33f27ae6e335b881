"""To the device and back: batches move while the model computes on the one before."""

from loaders.device.prefetcher import DevicePrefetcher as DevicePrefetcher

__all__ = ["DevicePrefetcher"]
