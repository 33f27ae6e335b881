"""`loaders.TarFiles`: samples from tar shards, by index."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, SupportsIndex

import numpy as np

from loaders.datasets.image_files import PackedPaths
from loaders.datasets.image_samples import ImageSamples
from loaders.datasets.protocol import in_range
from loaders.datasets.tar import index_file
from loaders.datasets.tar.fields import KEY, Field, Fields, chosen, decoder_of, default_fields
from loaders.datasets.tar.index import TarIndex, scan
from loaders.datasets.tar.members import Member
from loaders.datasets.tar.names import Shards, shard_paths
from loaders.datasets.tar.shards import OpenShards
from loaders.errors import DatasetError, DecodeError, add_note, describe_sample
from loaders.images.crops import Crop
from loaders.images.decode import printable, read_image
from loaders.images.multi_crop import MultiCrop
from loaders.timing.stages import DECODE

_IMAGE = "image"
_NAMED = 8  # extensions, at most


class TarFiles(ImageSamples):
    """Samples from tar shards in WebDataset's layout: `TarFiles("train-{000..127}.tar", crop=RandomResizedCrop(224))`.

    A sample is all files of one shard that have the same key, which is the name up to the first dot after the last
    slash: `a/0001.jpg`, `a/0001.cls`, `a/0001.seg.png`. They need not be neighbours. Equal keys in different shards are
    different samples. Samples are in the order of the shards, and in a shard in that of their first members.

    The headers of all shards are read once, several shards at once; the content of a member is read where it lies.
    Folders, links, hidden files, names without an extension and names like `__this__` are left out. At most 64 shards
    of a dataset are open in each process, or 4,096 behind URLs.

    Args:
        shards: a path, a pattern with braces (`{000..127}`, `{a,b}`) or wildcards, a URL for fsspec, or several of
            these.
        fields: name of a field → extensions of the member that it is made of, separated by semicolons: the first that a
            sample has is used. A pair `(extensions, function)` decodes by a function of the member's bytes; `bytes`
            itself keeps them. "__key__" is the key, "__url__" the path of the shard. By default every member is a
            field: images are "image", `cls` is "label", and all others have the name of their extension.
        transform: sample → sample, applied to the dict.
        crop, normalize: for the field "image", as in `ImageFiles`; JPEGs with restart markers are decoded and, once
            their markers are known, read in part.
        index: a path or URL where what was found is kept. If the file is missing it is written; if it exists it is used
            instead of reading headers, provided that the names, sizes and modification times of the shards are those
            that it was made of (of URLs, names and sizes). It contains no code.
        incomplete: what to do about samples that lack a field or, without `fields=`, have two images: "raise" an error,
            or "skip" them, which changes the numbers of the samples behind them.

    Attributes:
        shards: the paths or URLs, in order.
        skipped: shard and key of every sample that was left out, as raw names; those of `describe` are printable.
        group_sizes: int64 (shards,), number of samples in each: what a `GroupedSampler` takes.

    Sample:
        {"image": uint8 (H, W, 3) RGB as `read_image` gives it, "label": int, …}. By the last part of the extension:
        images as above; `cls`, `cls2`, `index`, `inx`, `id`, `count` int; `json`, `jsn` what is in it; `npy` an
        ndarray; `txt`, `text`, `transcript` str; all else bytes. Nothing is unpickled.

    Raises:
        DatasetError: a shard is missing, compressed, cut short, damaged, contains a sparse file or one name twice; a
            sample lacks a field; the index is damaged or of other shards.
        TypeError, ValueError: `fields`, `crop` or `normalize` is invalid.
        DecodeError: on reading: a member cannot be decoded, or its shard has changed; names the sample's index, shard
            and member.
    """

    def __init__(
        self,
        shards: Shards,
        fields: Fields | None = None,
        transform: Callable[[Any], Any] | None = None,
        *,
        crop: Crop | MultiCrop | None = None,
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
        index: str | os.PathLike[str] | None = None,
        incomplete: Literal["raise", "skip"] = "raise",
    ) -> None:
        super().__init__(transform, crop, normalize)
        asked = None if fields is None else chosen(fields)
        self.shards = shard_paths(shards)
        self._index = _index_of(self.shards, None if index is None else os.fspath(index))
        self._open = OpenShards(self.shards, self._index.shard_sizes, self._index.shard_times)
        extensions = self._index.extensions
        self._fields = default_fields(extensions) if asked is None else asked
        numbers = {extension: number for number, extension in enumerate(extensions)}
        # For each field the numbers of its extensions, the preferred one first.
        self._kinds = [[numbers[each] for each in field.extensions if each in numbers] for field in self._fields]
        if not len(self._index):
            raise DatasetError(
                f"The {len(self.shards):,} shards have no samples: a member needs a name with an extension, such as "
                "0001.jpg."
            )
        self.skipped = self._without_incomplete(incomplete, is_default=asked is None)
        self._image = next((number for number, field in enumerate(self._fields) if field.name == _IMAGE), None)
        self._others = [number for number in range(len(self._fields)) if number != self._image]
        self._require_image()

    def __len__(self) -> int:
        return self._per_file * len(self._index)

    @property
    def group_sizes(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """int64 (shards,): how many samples are in each shard."""
        return np.diff(self._index.shard_starts) * self._per_file

    def _read(self, index: int) -> dict[str, Any]:
        if self._image is None:
            return self._other_fields(index)
        if self.crop is None and self.normalize is None:
            return {_IMAGE: self._value(index, self._image), **self._other_fields(index)}
        return self._whole_sample(index)

    def _image_source(self, index: int) -> Member:
        assert self._image is not None
        return self._member(index, self._image)[0]

    def _other_fields(self, index: int) -> dict[str, Any]:
        return {self._fields[number].name: self._value(index, number) for number in self._others}

    read_into = ImageSamples.read_into  # `_read` returns what it writes

    def _value(self, index: int, number: int) -> Any:
        """The value of a field."""
        field = self._fields[number]
        if field.is_special:
            sample = index // self._per_file
            return self._index.keys[sample] if field.extensions[0] == KEY else self.shards[self._index.shard_of(sample)]
        member, kind = self._member(index, number)
        decode = field.decode or decoder_of(self._index.extensions[kind])
        if decode is None:
            return read_image(member, index=index)
        try:
            content = member.read()
        except OSError as error:
            raise self._unreadable(index, field, member, error) from error
        try:
            with DECODE:
                return decode(content)
        except Exception as error:
            if field.decode is None and isinstance(error, (ValueError, RecursionError)):
                raise self._unreadable(index, field, member, error) from error
            where = describe_sample(index, printable(member.name))
            add_note(error, f'Raised by the function that decodes field "{field.name}" of {where}.')
            raise

    def _member(self, index: int, number: int) -> tuple[Member, int]:
        """The member that a field is made of, and the number of its extension."""
        sample = index // self._per_file
        first, end = self._index.member_starts[sample : sample + 2].tolist()
        kinds = self._index.kinds[first:end].tolist()
        kind = next(each for each in self._kinds[number] if each in kinds)
        return Member(self._index, self._open, sample, first + kinds.index(kind)), kind

    def _unreadable(self, index: int, field: Field, member: Member, error: Exception) -> DecodeError:
        name = printable(member.name)
        why = f"{getattr(error, 'strerror', None) or error}."
        if not isinstance(error, OSError):
            why += "\n  Write the shard again, or decode the field by a function of your own."
        return DecodeError(
            f'{describe_sample(index, name)}, field "{field.name}": {why}',
            index=index,
            source=name,
            field=field.name,
        )

    def _without_incomplete(self, incomplete: str, *, is_default: bool) -> PackedPaths:
        """Leave out samples that lack a member for a field, or, without `fields=`, have two images. Returns which.

        Raises:
            DatasetError: there are some, and they are not to be skipped, or none is complete.
        """
        if incomplete not in ("raise", "skip"):
            raise ValueError(f'incomplete={incomplete!r} is unknown; use "raise" or "skip".')
        complete = np.ones(len(self._index), np.bool_)
        for field, kinds in zip(self._fields, self._kinds, strict=True):
            if not field.is_special:
                held = self._index.holders(kinds)
                is_right = held == 1 if is_default else held > 0
                if not is_right.all() and (incomplete == "raise" or not is_right.any()):
                    raise self._incomplete(field, held, int(is_right.argmin()), int((~is_right).sum()))
                complete &= is_right
        skipped = PackedPaths(map(self._key_of, np.flatnonzero(~complete).tolist()))
        if len(skipped) == len(self._index):
            raise DatasetError(
                f"The {len(self.shards):,} shards have no sample with all of {', '.join(self._names())}."
            )
        if len(skipped):
            self._index = self._index.only(complete)
        return skipped

    def _incomplete(self, field: Field, held: np.ndarray[Any, Any], first: int, count: int) -> DatasetError:
        found = f"{held[first]} members, not one," if held[first] else "no member"
        known = ", ".join(self._index.extensions[:_NAMED])
        return DatasetError(
            f'{count:,} of {len(held):,} samples have {found} for field "{field.name}" '
            f'({"; ".join(field.extensions)}), the first of them "{printable(self._key_of(first))}"; the shards have '
            f"members with the extensions {known}.\n  Say what is read of each sample, such as "
            'fields={"image": "jpg;png", "label": "cls"}, or '
            'leave these samples out by incomplete="skip".'
        )

    def _require_image(self) -> None:
        field = None if self._image is None else self._fields[self._image]
        if (self.crop is not None or self.normalize is not None) and (field is None or not field.is_image):
            raise ValueError(
                'crop= and normalize= are for the field "image", decoded by this package: name it in fields=, with '
                'extensions of images alone, such as {"image": "jpg;png"}.'
            )
        if self.crop is not None:
            beside = [self._fields[number].name for number in self._others if self._fields[number].has_images]
            if beside:
                raise ValueError(
                    f'crop= would cut the field "image" and not {", ".join(map(repr, beside))}: leave it out, and crop '
                    "them together in the transform, or decode them by a function of your own."
                )

    def _key_of(self, sample: int) -> str:
        return f"{self.shards[self._index.shard_of(sample)]}/{self._index.keys[sample]}"

    def describe(self, index: SupportsIndex) -> str:
        """The path of the shard and the key in it, as printable text."""
        return printable(self._key_of(in_range(index, len(self)) // self._per_file))

    def __repr__(self) -> str:
        several = f", {self._per_file} of each image" if self._per_file > 1 else ""
        skipped = f", {len(self.skipped):,} skipped" if len(self.skipped) else ""
        names = ", ".join(self._names()[:4]) + (", …" if len(self._fields) > 4 else "")
        return f"TarFiles({len(self):,} samples{several} in {len(self.shards):,} shards{skipped}: {names})"

    def _names(self) -> list[str]:
        return [field.name for field in self._fields]


def _index_of(shards: list[str], path: str | None) -> TarIndex:
    index = None if path is None else index_file.load(path, shards)
    if index is None:
        index = scan(shards)
        if path is not None:
            index_file.save(path, index)
    return index
