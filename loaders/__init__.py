"""Feeds PyTorch from NumPy-native datasets: one host write, no copy after it, safe to hold.

Importing this package imports neither torch nor albumentations: names resolve on first use. Errors that are not
exported here are in `loaders.errors`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loaders import errors as errors

__version__ = "0.1.0"

if TYPE_CHECKING:
    from loaders.batch.assemble import Padded as Padded
    from loaders.batch.assemble import Ragged as Ragged
    from loaders.batch.collate import numpy_collate as numpy_collate
    from loaders.batch.spec import Field as Field
    from loaders.bridge import as_array as as_array
    from loaders.bridge import as_tensor as as_tensor
    from loaders.bridge import shares_memory as shares_memory
    from loaders.bridge import to_image as to_image
    from loaders.bridge import to_numpy as to_numpy
    from loaders.dataloader.loader import DataLoader as DataLoader
    from loaders.datasets.arrays import ArrayDataset as ArrayDataset
    from loaders.datasets.arrow.dataset import ArrowDataset as ArrowDataset
    from loaders.datasets.cache.decoded import DecodedCache as DecodedCache
    from loaders.datasets.detection.coco import CocoDetection as CocoDetection
    from loaders.datasets.detection.mask_folder import MaskFolder as MaskFolder
    from loaders.datasets.detection.voc import VocDetection as VocDetection
    from loaders.datasets.detection.yolo import YoloDetection as YoloDetection
    from loaders.datasets.image_files import ImageFiles as ImageFiles
    from loaders.datasets.image_files import ImageFolder as ImageFolder
    from loaders.datasets.per_worker import PerWorker as PerWorker
    from loaders.datasets.protocol import Dataset as Dataset
    from loaders.datasets.tar.tar_files import TarFiles as TarFiles
    from loaders.device.event_timing import TransferTime as TransferTime
    from loaders.device.event_timing import transfer_time as transfer_time
    from loaders.device.mixing import CutMix as CutMix
    from loaders.device.mixing import MixUp as MixUp
    from loaders.device.named_streams import record_stream as record_stream
    from loaders.device.normalize import Normalize as Normalize
    from loaders.device.prefetcher import DevicePrefetcher as DevicePrefetcher
    from loaders.errors import ConversionError as ConversionError
    from loaders.errors import DatasetError as DatasetError
    from loaders.errors import DecodeError as DecodeError
    from loaders.errors import LoadersError as LoadersError
    from loaders.errors import SampleError as SampleError
    from loaders.errors import StateError as StateError
    from loaders.errors import WorkerLostError as WorkerLostError
    from loaders.errors import WorkerTimeoutError as WorkerTimeoutError
    from loaders.images.albumentations import Albumentations as Albumentations
    from loaders.images.crops import CenterCrop as CenterCrop
    from loaders.images.crops import Crop as Crop
    from loaders.images.crops import RandomResizedCrop as RandomResizedCrop
    from loaders.images.crops import Resize as Resize
    from loaders.images.decode import image_size as image_size
    from loaders.images.decode import read_image as read_image
    from loaders.images.multi_crop import MultiCrop as MultiCrop
    from loaders.images.patches import RandomPatches as RandomPatches
    from loaders.outputs.collector import OutputCollector as OutputCollector
    from loaders.outputs.scalars import ScalarLog as ScalarLog
    from loaders.randomness.streams import sample_rng as sample_rng
    from loaders.report.figures import SlowSample as SlowSample
    from loaders.report.figures import TransferReport as TransferReport
    from loaders.report.figures import WorkerReport as WorkerReport
    from loaders.report.progress import progress as progress
    from loaders.report.report import Report as Report
    from loaders.report.statistics import SkippedSample as SkippedSample
    from loaders.sampling.base import KeyedSampler as KeyedSampler
    from loaders.sampling.grouped import GroupedSampler as GroupedSampler
    from loaders.sampling.mixture import Mixture as Mixture
    from loaders.sampling.mixture import MixtureSampler as MixtureSampler
    from loaders.sampling.sharded import ShardedSampler as ShardedSampler
    from loaders.sampling.weighted import WeightedSampler as WeightedSampler
    from loaders.timing.stages import stage as stage
    from loaders.timing.trace import trace as trace
    from loaders.workers.info import WorkerInfo as WorkerInfo
    from loaders.workers.info import worker_info as worker_info

_NAMES = {
    "loaders.batch.assemble": (
        "Padded",
        "Ragged",
    ),
    "loaders.batch.collate": ("numpy_collate",),
    "loaders.batch.spec": ("Field",),
    "loaders.bridge": (
        "as_array",
        "as_tensor",
        "shares_memory",
        "to_image",
        "to_numpy",
    ),
    "loaders.dataloader.loader": ("DataLoader",),
    "loaders.datasets.arrays": ("ArrayDataset",),
    "loaders.datasets.arrow.dataset": ("ArrowDataset",),
    "loaders.datasets.cache.decoded": ("DecodedCache",),
    "loaders.datasets.detection.coco": ("CocoDetection",),
    "loaders.datasets.detection.mask_folder": ("MaskFolder",),
    "loaders.datasets.detection.voc": ("VocDetection",),
    "loaders.datasets.detection.yolo": ("YoloDetection",),
    "loaders.datasets.image_files": (
        "ImageFiles",
        "ImageFolder",
    ),
    "loaders.datasets.per_worker": ("PerWorker",),
    "loaders.datasets.protocol": ("Dataset",),
    "loaders.datasets.tar.tar_files": ("TarFiles",),
    "loaders.device.mixing": (
        "CutMix",
        "MixUp",
    ),
    "loaders.device.normalize": ("Normalize",),
    "loaders.device.prefetcher": ("DevicePrefetcher",),
    "loaders.device.named_streams": ("record_stream",),
    "loaders.device.event_timing": (
        "TransferTime",
        "transfer_time",
    ),
    "loaders.errors": (
        "ConversionError",
        "DatasetError",
        "DecodeError",
        "LoadersError",
        "SampleError",
        "StateError",
        "WorkerLostError",
        "WorkerTimeoutError",
    ),
    "loaders.images.albumentations": ("Albumentations",),
    "loaders.images.crops": (
        "CenterCrop",
        "Crop",
        "RandomResizedCrop",
        "Resize",
    ),
    "loaders.images.decode": (
        "image_size",
        "read_image",
    ),
    "loaders.images.multi_crop": ("MultiCrop",),
    "loaders.images.patches": ("RandomPatches",),
    "loaders.outputs.collector": ("OutputCollector",),
    "loaders.outputs.scalars": ("ScalarLog",),
    "loaders.randomness.streams": ("sample_rng",),
    "loaders.report.progress": ("progress",),
    "loaders.report.figures": ("SlowSample", "TransferReport", "WorkerReport"),
    "loaders.report.report": ("Report",),
    "loaders.report.statistics": ("SkippedSample",),
    "loaders.sampling.base": ("KeyedSampler",),
    "loaders.sampling.grouped": ("GroupedSampler",),
    "loaders.sampling.mixture": (
        "Mixture",
        "MixtureSampler",
    ),
    "loaders.sampling.sharded": ("ShardedSampler",),
    "loaders.sampling.weighted": ("WeightedSampler",),
    "loaders.timing.stages": ("stage",),
    "loaders.timing.trace": ("trace",),
    "loaders.workers.info": (
        "WorkerInfo",
        "worker_info",
    ),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = ["__version__", "errors", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'loaders' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
