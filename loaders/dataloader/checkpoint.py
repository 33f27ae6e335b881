"""Where a loader is in its epochs: what `state_dict()` gives and `load_state_dict()` takes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.utils.data import BatchSampler

from loaders.dataloader.cursor import inner_sampler, world_of
from loaders.errors import StateError

if TYPE_CHECKING:
    from loaders.dataloader.loader import DataLoader

VERSION = 1
_MAY_DIFFER = {
    False: "only the number of workers, their kind, and at equal global batch the number of ranks may differ",
    True: "of an IterableDataset only the kind of workers may differ, not their number: each has a stream of its own",
}


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


_NO = object()  # nothing fits it
_FITS: dict[str, Callable[[Any], bool]] = {
    "version": _is_count,
    "seed": lambda value: value is None or type(value) is int,
    "epoch": _is_count,
    "batches": _is_count,
    "keys": _is_count,
    "origin": lambda value: isinstance(value, dict),
    "failed": lambda value: isinstance(value, (list, tuple)) and all(len(each) == 4 for each in value),
}


@dataclass
class Progress:
    """How far one epoch has been delivered. Plain numbers: nothing of it depends on how far workers are ahead.

    Attributes:
        epoch: its number.
        batches: handed out to the caller.
        keys: of this rank, that these batches took from the sampler, skipped ones included.
        origin: what makes the sampler give the same keys again (see `KeyStream`).
        failed: positions of samples that a policy left out, as (position, index, source, error).
        lanes: of an IterableDataset: per worker the number of batches handed out, or -1 where its stream has ended.
        lane: the worker whose batch is next.
        streams: per worker the dataset's own `state_dict()` behind its last batch that was handed out, if it has one.
        first: among this rank's keys, the position of the first one of the batch that was handed out last.
        sizes: of batches to come, where samples that were skipped have moved those of a user's batch sampler.
        sized: the position behind the last key whose batch is counted in `sizes`.
    """

    epoch: int
    batches: int = 0
    keys: int = 0
    origin: dict[str, Any] = field(default_factory=dict)
    failed: list[tuple[int, Any, str | None, str]] = field(default_factory=list)
    lanes: list[int] = field(default_factory=list)
    lane: int = 0
    streams: list[Any] = field(default_factory=list)
    first: int = 0
    sizes: list[int] = field(default_factory=list)
    sized: int = 0

    def copy(self) -> Progress:
        """One that can go on by itself."""
        return copy.deepcopy(self)


def state_of(loader: DataLoader[Any], progress: Progress, seed: int | None) -> dict[str, Any]:
    """The state that `loader` is in. `keys` are counted over all ranks, so that another number of ranks can go on."""
    world_size = world_of(inner_sampler(loader))[1]
    state: dict[str, Any] = {
        "version": VERSION,
        "seed": seed,
        **_must_agree(loader),
        "epoch": progress.epoch,
        "batches": progress.batches,
        "keys": progress.keys * world_size,
        "origin": progress.origin,
        "failed": [list(each) for each in progress.failed],
    }
    if progress.lanes:
        state |= {"lanes": progress.lanes, "lane": progress.lane, "streams": progress.streams}
    if progress.sizes:
        state |= {"sizes": progress.sizes, "sized": progress.sized}
    return copy.deepcopy(state)


def progress_of(loader: DataLoader[Any], state: Mapping[str, Any]) -> Progress:
    """The progress that a state tells of.

    Raises:
        StateError: the state is of a loader over other data, in other batches or with another seed.
    """
    if not isinstance(state, Mapping):
        raise StateError(f"This is no state of a loaders.DataLoader, but a {type(state).__name__}.")
    wrong = [
        f"{name} is {state.get(name, 'missing')!r}" for name, fits in _FITS.items() if not fits(state.get(name, _NO))
    ]
    if wrong:
        raise StateError(f"This is no state of a loaders.DataLoader: {', '.join(wrong)}.")
    differences = [
        f"{name} is {state.get(name)!r} in the state and {mine!r} here"
        for name, mine in {"version": VERSION, **_must_agree(loader)}.items()
        if state.get(name) != mine
    ]
    if loader.seed is not None and state["seed"] is not None and state["seed"] != loader.seed:
        differences.append(f"seed is {state['seed']} in the state and {loader.seed} here")
    world_size = world_of(inner_sampler(loader))[1]
    if state["keys"] % world_size:
        differences.append(f"{state['keys']} samples were delivered, which {world_size} ranks cannot share evenly")
    if differences:
        raise StateError(
            f"This state does not fit this loader: {'; '.join(differences)}.\n  Make the loader as it was when the "
            f"state was taken; {_MAY_DIFFER[loader._plan.fetch == 'stream']}."
        )
    state = copy.deepcopy(dict(state))
    return Progress(
        epoch=state["epoch"],
        batches=state["batches"],
        keys=state["keys"] // world_size,
        origin=state["origin"],
        failed=[(position, index, source, error) for position, index, source, error in state["failed"]],
        lanes=state.get("lanes", []),
        lane=state.get("lane", 0),
        streams=state.get("streams", []),
        sizes=state.get("sizes", []),
        sized=state.get("sized", 0),
    )


def _must_agree(loader: DataLoader[Any]) -> dict[str, Any]:
    world_size = world_of(inner_sampler(loader))[1]
    if loader._plan.fetch == "stream":
        # Each worker has a stream of its own: what it holds depends on how many there are.
        return {"num_workers": loader.num_workers, "batch_size": loader.batch_size, "drop_last": loader.drop_last}
    batches, size, drop_last = loader.batch_sampler, loader.batch_size, loader.drop_last
    if type(batches) is BatchSampler:
        size, drop_last = batches.batch_size, batches.drop_last
    return {
        "length": _length(loader.dataset),
        "global_batch": None if size is None else size * world_size,
        "drop_last": drop_last,
        "sampler": type(inner_sampler(loader)).__name__,
        # An order that the seed fixes is not kept in the state; any other is.
        "seeded": loader.seed is not None,
    }


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None
