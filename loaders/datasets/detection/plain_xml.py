"""XML without a document type: no entities, which could expand to gigabytes or name other files."""

from __future__ import annotations

from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from loaders.datasets.detection.found import read_small

_DEEPEST = 100
_MOST_NBYTES = 1 << 26


def read_plain_xml(file: str) -> Element:
    """The root element of an XML file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not XML, or declares a document type, or nests its elements hundreds deep.
    """
    data = read_small(file, _MOST_NBYTES)
    builder, parser, depth = TreeBuilder(), expat.ParserCreate(), 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"its elements are nested more than {_DEEPEST} deep")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def refuse(*_: Any) -> None:
        raise ValueError("it declares a document type, which annotations do not need")

    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, LookupError) as error:  # LookupError: an encoding that Python does not have
        raise ValueError(f"it is not XML: {error}") from None
    return builder.close()
