"""One part of a comparison in its own process: `python -m loaders.benchmark.run PART FILE`.

PART is JSON: the part's name and its arguments. The result goes to FILE as JSON, since the target may print. Errors of
ours end the process with status 1 and their message on stderr, without a traceback.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loaders.benchmark.alone import (
    Repeated,
    copying_per_s,
    device_copies_per_s,
    first_sample,
    is_dataset,
    reading_per_s,
)
from loaders.benchmark.measurement import measure
from loaders.benchmark.setups import Setup, spread_indices
from loaders.benchmark.target import dataset_of, is_stock, load_target, loader_argument
from loaders.errors import LoadersError

READY = "ready\n"
_ENDLESS = 1 << 40
# A pass is cut off after this many times the requested seconds: the epoch was sized for them, and its end counts.
_PATIENCE = 4


def probe(target: str, crop: int, seconds: float) -> dict[str, Any]:
    """What the target is, and how long its samples take to read."""
    made = load_target(target, crop)
    dataset = dataset_of(made)
    found: dict[str, Any] = {
        "is_loader": dataset is not made,
        "kind": type(made if dataset is None else dataset).__name__,
        "length": None,
        "batch_size": loader_argument(made, "batch_size"),
    }
    if is_dataset(dataset):
        found["length"] = len(dataset)
        indices = spread_indices(len(dataset), min(len(dataset), 4096)) if len(dataset) else None
        found["per_s"] = reading_per_s(dataset, indices, seconds)
    elif not hasattr(made, "batch_sampler"):
        found["is_loader"] = True
    return found


def alone(target: str, crop: int, samples: int, seconds: float, together: bool) -> dict[str, Any]:
    """Samples per second of the dataset alone, and of copies alone, in this process.

    With `together` it waits on its standard input before each of the two, so that several processes run in step.
    """
    dataset = dataset_of(load_target(target, crop))
    indices = spread_indices(len(dataset), samples) if is_dataset(dataset) else None
    sample = first_sample(dataset, indices)
    _meet(together)
    reading = reading_per_s(dataset, indices, seconds)
    _meet(together)
    return {"reading_per_s": reading, "copying_per_s": copying_per_s(sample, seconds)}


def loader(
    target: str, crop: int, setup: dict[str, Any], samples: int, batch_size: int, seconds: float
) -> dict[str, Any]:
    """One loader over the target, a warm-up pass and one that counts; then, for ours, the rates it could deliver.

    These are samples per second of one ready sample through the same loader, and from page-locked memory to the device.
    """
    made, which = load_target(target, crop), Setup(**setup)
    dataset = dataset_of(made)
    indices = spread_indices(len(dataset), samples) if is_dataset(dataset) else None
    source = which.make(made, indices, batch_size)
    found: dict[str, Any] = {"delivery_per_s": None, "device_per_s": None}
    found["loader"] = measure(source, name=which.name, rounds=1, seconds=seconds * _PATIENCE).to_dict()
    is_torchs = which.whose == "torch" or (which.whose == "as it is" and is_stock(made))
    if indices is not None and not is_torchs:
        sample = first_sample(dataset, indices)
        ready = which.make(made, range(_ENDLESS), batch_size, Repeated(sample, _ENDLESS))
        found["delivery_per_s"] = measure(ready, rounds=1, seconds=seconds / 2).samples_per_s.median
        found["device_per_s"] = device_copies_per_s(sample, batch_size)
    return found


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "probe": probe,
    "alone": alone,
    "loader": loader,
}


def _meet(together: bool) -> None:
    if together:
        print(READY, end="", flush=True)
        sys.stdin.readline()


def main(part: str, file: str) -> int:
    """Run the part and write its result to the file."""
    arguments = json.loads(part)
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise it contacts a server, in each of these processes
    try:
        found = PARTS[arguments.pop("part")](**arguments)
    except LoadersError as error:
        print(error, file=sys.stderr)
        return 1
    Path(file).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
