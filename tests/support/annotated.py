"""Small data sets with annotations, written in each format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

WIDTH, HEIGHT = 40, 30


def write_picture(path: Path, width: int = WIDTH, height: int = HEIGHT, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(value)
    cv2.imwrite(str(path), rng.integers(0, 256, (height, width, 3), np.uint8))


def coco(*annotations: dict[str, Any], images: int = 3, **changes: Any) -> dict[str, Any]:
    """The content of a file: images 10, 20, …, and two categories, 7 "cat" and 3 "dog"."""
    content: dict[str, Any] = {
        "images": [
            {"id": 10 * (n + 1), "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in range(images)
        ],
        "annotations": [{"id": n + 1, **annotation} for n, annotation in enumerate(annotations)],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    }
    return content | changes


def box(image: int = 10, bbox: Any = (1, 2, 3, 4), category: int = 7, **more: Any) -> dict[str, Any]:
    """An annotation; its bbox is left, top, width, height."""
    return {"image_id": image, "category_id": category, "bbox": list(bbox), "area": 1.0, "iscrowd": 0} | more


def write_coco(folder: Path, content: Any, images: int = 3) -> Path:
    for number in range(images):
        write_picture(folder / f"{number}.png", value=number)
    file = folder / "annotations.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def write_yolo(
    root: Path, labels: dict[str, str], *, yaml: str | None = "names: [cat, dog]\ntrain: images/train\n"
) -> Path:
    """Pictures and label files of the split "train"; a text of None writes only the picture."""
    for number, (name, text) in enumerate(labels.items()):
        write_picture(root / "images" / "train" / f"{name}.png", value=number)
        file = root / "labels" / "train" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            file.write_text(text)
    if yaml is not None:
        (root / "data.yaml").write_text(yaml)
    return root


def voc_object(name: str = "cat", corners: Any = (1, 2, 10, 20), more: str = "") -> str:
    sides = "".join(
        f"<{side}>{at}</{side}>" for side, at in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    return f"<object><name>{name}</name><bndbox>{sides}</bndbox>{more}</object>"


def write_voc(root: Path, objects: dict[str, str], *, size: bool = True, prolog: str = "") -> Path:
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    (root / "JPEGImages").mkdir(exist_ok=True)
    sides = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>" if size else ""
    for number, (name, text) in enumerate(objects.items()):
        write_picture(root / "JPEGImages" / f"{name}.png", value=number)
        (root / "Annotations" / f"{name}.xml").write_text(
            f"{prolog}<annotation><filename>{name}.png</filename>{sides}{text}</annotation>"
        )
    return root
