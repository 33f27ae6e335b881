"""What is wrong with annotations: refused with a list, or left out and counted."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

from loaders.errors import DatasetError

OnBad = Literal["error", "drop"]

# What every reader corrects by itself: a box is clipped, or has nothing left to learn from.
CLIPPED, OUTSIDE, EMPTY = "clipped box", "box outside the picture", "box without area"
KEYPOINT_OUTSIDE = "keypoint outside the picture"
_CORRECTED = (CLIPPED, OUTSIDE, EMPTY, KEYPOINT_OUTSIDE)
_LISTED = 100
_TOLD = 5


class Problem(NamedTuple):
    """One entry of an annotation file that was corrected or left out.

    Attributes:
        kind: such as "clipped box", "missing image", "unknown category", "malformed entry".
        file: the file, as printable text.
        entry: the entry in it, such as "annotation 17" or "line 3"; empty if it is the file itself.
        what: what was found and what was expected.
    """

    kind: str
    file: str
    entry: str
    what: str

    def __str__(self) -> str:
        return f'"{self.file}"{", " if self.entry else ""}{self.entry}: {self.what}'


class EntryError(Exception):
    """One entry cannot be used; caught by the reader, which adds where the entry is."""

    def __init__(self, what: str, kind: str = "malformed entry") -> None:
        super().__init__(what)
        self.kind = kind


class Problems:
    """Counts of what was corrected or left out when the annotations were read.

    Attributes:
        counts: kind → how many.
        listed: the first 100 of each kind, as `Problem`s.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.listed: list[Problem] = []

    def add(self, kind: str, file: str, entry: str, what: str) -> None:
        """Count one problem."""
        count = self.counts[kind] = self.counts.get(kind, 0) + 1
        if count <= _LISTED:
            self.listed.append(Problem(kind, file, entry, what))

    def refuse(self) -> None:
        """Refuse everything but boxes that were clipped, or dropped for having no area in the picture.

        Raises:
            DatasetError: there is a problem of another kind; the message has the counts and the first few.
        """
        bad = {kind: count for kind, count in self.counts.items() if kind not in _CORRECTED}
        if not bad:
            return
        first = [str(problem) for problem in self.listed if problem.kind in bad][:_TOLD]
        count = sum(bad.values())
        if count > len(first):
            first.append(f"… and {count - len(first):,} more")
        lines = "\n  ".join(first)
        raise DatasetError(
            f"{count:,} {'entry' if count == 1 else 'entries'} of the annotations cannot be used ({_told(bad)}):\n"
            f'  {lines}\n  Correct the files, or pass on_bad="drop" to leave these out; `dataset.problems` then counts '
            "and lists them."
        )

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __repr__(self) -> str:
        return f"Problems({_told(self.counts) or 'none'})"


def checked_on_bad(on_bad: Any) -> OnBad:
    """The argument `on_bad`.

    Raises:
        ValueError: it is neither "error" nor "drop".
    """
    if on_bad not in get_args(OnBad):
        raise ValueError(f'on_bad={on_bad!r} is unknown; use "error" or "drop".')
    checked: OnBad = on_bad
    return checked


def _told(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
