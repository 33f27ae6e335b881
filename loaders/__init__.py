"""Feeds PyTorch from NumPy-native datasets: one host write, no copy after it, safe to hold.

Importing this package imports neither torch nor albumentations: names resolve on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from loaders.augment import Albumentations as Albumentations
    from loaders.batching.assemble import Padded as Padded
    from loaders.batching.assemble import Ragged as Ragged
    from loaders.batching.collate import numpy_collate as numpy_collate
    from loaders.bridge import as_array as as_array
    from loaders.bridge import as_tensor as as_tensor
    from loaders.bridge import shares_memory as shares_memory
    from loaders.bridge import to_image as to_image
    from loaders.bridge import to_numpy as to_numpy
    from loaders.crops import CenterCrop as CenterCrop
    from loaders.crops import RandomResizedCrop as RandomResizedCrop
    from loaders.crops import Resize as Resize
    from loaders.dataloader import DataLoader as DataLoader
    from loaders.datasets import ArrayDataset as ArrayDataset
    from loaders.datasets import Dataset as Dataset
    from loaders.datasets import DecodedCache as DecodedCache
    from loaders.datasets import ImageFiles as ImageFiles
    from loaders.datasets import ImageFolder as ImageFolder
    from loaders.decode import image_size as image_size
    from loaders.decode import read_image as read_image
    from loaders.device import CutMix as CutMix
    from loaders.device import DevicePrefetcher as DevicePrefetcher
    from loaders.device import MixUp as MixUp
    from loaders.device import Normalize as Normalize
    from loaders.device import OutputCollector as OutputCollector
    from loaders.device import ScalarLog as ScalarLog
    from loaders.device import TransferTime as TransferTime
    from loaders.device import record_stream as record_stream
    from loaders.device import transfer_time as transfer_time
    from loaders.errors import ArrayKindError as ArrayKindError
    from loaders.errors import BufferMemoryError as BufferMemoryError
    from loaders.errors import CollectError as CollectError
    from loaders.errors import ConversionError as ConversionError
    from loaders.errors import DatasetError as DatasetError
    from loaders.errors import DecodeError as DecodeError
    from loaders.errors import DeviceError as DeviceError
    from loaders.errors import DtypeError as DtypeError
    from loaders.errors import FieldDtypeError as FieldDtypeError
    from loaders.errors import FieldNameError as FieldNameError
    from loaders.errors import FieldShapeError as FieldShapeError
    from loaders.errors import ImageShapeError as ImageShapeError
    from loaders.errors import LoadersError as LoadersError
    from loaders.errors import MissingExtraError as MissingExtraError
    from loaders.errors import SampleError as SampleError
    from loaders.errors import ShareError as ShareError
    from loaders.errors import SlotStateError as SlotStateError
    from loaders.errors import StateError as StateError
    from loaders.errors import UserCodeError as UserCodeError
    from loaders.errors import WorkerLostError as WorkerLostError
    from loaders.errors import WorkerTimeoutError as WorkerTimeoutError
    from loaders.failures import SkippedSample as SkippedSample
    from loaders.observe.progress import progress as progress
    from loaders.observe.report import Report as Report
    from loaders.observe.trace import trace as trace
    from loaders.patches import RandomPatches as RandomPatches
    from loaders.rng import sample_rng as sample_rng
    from loaders.sampling import Mixture as Mixture
    from loaders.sampling import ShardedSampler as ShardedSampler
    from loaders.sampling import WeightedSampler as WeightedSampler
    from loaders.spec import Field as Field
    from loaders.stages import stage as stage
    from loaders.workers import worker_info as worker_info

_NAMES = {
    "loaders.augment": ("Albumentations",),
    "loaders.batching.assemble": ("Padded", "Ragged"),
    "loaders.batching.collate": ("numpy_collate",),
    "loaders.bridge": ("as_array", "as_tensor", "shares_memory", "to_image", "to_numpy"),
    "loaders.crops": ("CenterCrop", "RandomResizedCrop", "Resize"),
    "loaders.dataloader": ("DataLoader",),
    "loaders.datasets": ("ArrayDataset", "Dataset", "DecodedCache", "ImageFiles", "ImageFolder"),
    "loaders.decode": ("image_size", "read_image"),
    "loaders.device": (
        "CutMix",
        "DevicePrefetcher",
        "MixUp",
        "Normalize",
        "OutputCollector",
        "ScalarLog",
        "TransferTime",
        "record_stream",
        "transfer_time",
    ),
    "loaders.errors": (
        "ArrayKindError",
        "BufferMemoryError",
        "CollectError",
        "ConversionError",
        "DatasetError",
        "DecodeError",
        "DeviceError",
        "DtypeError",
        "FieldDtypeError",
        "FieldNameError",
        "FieldShapeError",
        "ImageShapeError",
        "LoadersError",
        "MissingExtraError",
        "SampleError",
        "ShareError",
        "SlotStateError",
        "StateError",
        "UserCodeError",
        "WorkerLostError",
        "WorkerTimeoutError",
    ),
    "loaders.failures": ("SkippedSample",),
    "loaders.observe.progress": ("progress",),
    "loaders.observe.report": ("Report",),
    "loaders.observe.trace": ("trace",),
    "loaders.patches": ("RandomPatches",),
    "loaders.rng": ("sample_rng",),
    "loaders.sampling": ("Mixture", "ShardedSampler", "WeightedSampler"),
    "loaders.spec": ("Field",),
    "loaders.stages": ("stage",),
    "loaders.workers": ("worker_info",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    module = _HOME.get(name)
    if name == "benchmark":  # so that `loaders.benchmark.measure` needs no import of its own
        return importlib.import_module("loaders.benchmark")
    if module is None:
        raise AttributeError(f"module 'loaders' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(module), name)
    return value


def __dir__() -> list[str]:
    return __all__
