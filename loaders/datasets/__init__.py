"""Datasets: an index in, a sample of ndarrays, scalars and strings out. NumPy only; any DataLoader can read them."""

from loaders.datasets.arrays import ArrayDataset as ArrayDataset
from loaders.datasets.cache import DecodedCache as DecodedCache
from loaders.datasets.images import ImageFiles as ImageFiles
from loaders.datasets.images import ImageFolder as ImageFolder
from loaders.datasets.protocol import Dataset as Dataset
