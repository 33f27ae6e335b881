"""Which members of a sample become which fields, and how their bytes are decoded.

fields={"image": "jpg;jpeg;png", "label": "cls", "mask": ("seg.png", decode_mask), "key": "__key__"}
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np

from loaders.images.decode import EXTENSIONS

Decode = Callable[[bytes], Any]
Fields = Mapping[str, str | tuple[str, Decode]]

KEY, SHARD = "__key__", "__url__"  # WebDataset's names of what is not in a member
_IMAGES = {*(extension[1:] for extension in EXTENSIONS), "img", "image", "jpe", "jfif"}
# What NumPy's reader raises for a damaged or forged header.
_NOT_AN_ARRAY = (ValueError, EOFError, TypeError, SyntaxError, ArithmeticError, MemoryError, RecursionError, TokenError)
_IMAGE, _LABEL = "image", "label"  # the fields that images and classes become without fields=


class Field(NamedTuple):
    """One field of the samples.

    Attributes:
        name: its key in the sample.
        extensions: of the member it is made of: the first of these that a sample has.
        decode: what makes its value of the member's bytes; None decodes by extension.
    """

    name: str
    extensions: tuple[str, ...]
    decode: Decode | None = None

    @property
    def is_special(self) -> bool:
        """Whether it is not made of a member."""
        return self.extensions[0] in (KEY, SHARD)

    @property
    def is_image(self) -> bool:
        """Whether whatever member it is made of is decoded as an image."""
        return self.decode is None and all(map(is_image, self.extensions))

    @property
    def has_images(self) -> bool:
        """Whether a member may be decoded as an image."""
        return self.decode is None and any(map(is_image, self.extensions))


def is_image(extension: str) -> bool:
    """Whether members with this extension are decoded by `read_image`: `jpg`, also `left.jpg`."""
    return extension.rpartition(".")[2] in _IMAGES


def chosen(fields: Fields) -> list[Field]:
    """The fields that an argument describes.

    Raises:
        TypeError, ValueError: it is invalid.
    """
    if not isinstance(fields, Mapping) or not fields:
        raise TypeError(
            f'fields={fields!r}: expected a dict of name → extensions, such as {{"image": "jpg;png", "label": "cls"}}.'
        )
    found = []
    for name, value in fields.items():
        extensions, decode = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
        if not isinstance(extensions, str) or not (decode is None or callable(decode)):
            raise TypeError(
                f'fields[{name!r}] is {value!r}: expected extensions such as "jpg;png", or a pair of them and a '
                "function of bytes."
            )
        parts = tuple(each.strip().lower().removeprefix(".") for each in extensions.split(";"))
        if "" in parts or (len(parts) > 1 and not {KEY, SHARD}.isdisjoint(parts)):
            raise ValueError(f'fields[{name!r}]: {extensions!r} is no list of extensions such as "jpg;png".')
        found.append(Field(name, parts, decode))
    return found


def default_fields(extensions: Sequence[str]) -> list[Field]:
    """A field for every extension: images as "image", `cls` as "label", all others under their extension."""
    images = tuple(each for each in extensions if each in _IMAGES)
    others = [each for each in extensions if each not in images]
    label = _LABEL if _LABEL not in others else "cls"
    return [
        *([Field(_IMAGE, images)] if images else []),
        *(Field(label if each == "cls" else each, (each,)) for each in others),
    ]


def decoder_of(extension: str) -> Decode | None:
    """What decodes members with this extension, or raises a ValueError; None for images."""
    return None if is_image(extension) else _DECODERS.get(extension.rpartition(".")[2], bytes)


def _text(content: bytes) -> str:
    return content.decode("utf-8")


def _array(content: bytes) -> np.ndarray[Any, Any]:
    try:
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except _NOT_AN_ARRAY as error:
        raise ValueError(f"it is no array that NumPy can read without running code: {error}") from error
    return array


_DECODERS: dict[str, Decode] = {
    **dict.fromkeys(("cls", "cls2", "index", "inx", "id", "count"), int),
    **dict.fromkeys(("json", "jsn"), json.loads),
    **dict.fromkeys(("txt", "text", "transcript"), _text),
    "npy": _array,
}
