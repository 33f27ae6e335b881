"""To the device and back: batches move while the model computes on the one before."""

from loaders.device.collector import OutputCollector as OutputCollector
from loaders.device.mixing import CutMix as CutMix
from loaders.device.mixing import MixUp as MixUp
from loaders.device.normalize import Normalize as Normalize
from loaders.device.prefetcher import DevicePrefetcher as DevicePrefetcher
from loaders.device.record import record_stream as record_stream
from loaders.device.scalars import ScalarLog as ScalarLog
from loaders.device.timing import TransferTime as TransferTime
from loaders.device.timing import transfer_time as transfer_time

__all__ = [
    "CutMix",
    "DevicePrefetcher",
    "MixUp",
    "Normalize",
    "OutputCollector",
    "ScalarLog",
    "TransferTime",
    "record_stream",
    "transfer_time",
]
