"""NumPy ↔ torch, exactly: what shares memory, what copies, and what neither can do.

`as_tensor` and `as_array` follow the array API's meaning of `copy`; `to_numpy` and `to_image` always return new memory.
`docs/conversions.md` is the table of every dtype and layout, generated from this package.
"""

from loaders.bridge.arrays import as_array
from loaders.bridge.image import to_image
from loaders.bridge.nests import to_numpy
from loaders.bridge.sharing import shares_memory
from loaders.bridge.tensors import as_tensor

__all__ = ["as_array", "as_tensor", "shares_memory", "to_image", "to_numpy"]
