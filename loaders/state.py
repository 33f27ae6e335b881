"""Where a loader is in its epochs: what `state_dict()` gives and `load_state_dict()` takes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loaders.errors import StateError
from loaders.keys import inner_sampler, world_of

if TYPE_CHECKING:
    from loaders.dataloader import DataLoader

VERSION = 1


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
    """

    epoch: int
    batches: int = 0
    keys: int = 0
    origin: dict[str, Any] = field(default_factory=dict)
    failed: list[tuple[int, Any, str | None, str]] = field(default_factory=list)
    lanes: list[int] = field(default_factory=list)
    lane: int = 0
    streams: list[Any] = field(default_factory=list)

    def copy(self) -> Progress:
        """One that can go on by itself."""
        return copy.deepcopy(self)


def state_of(loader: DataLoader[Any], progress: Progress, seed: int | None) -> dict[str, Any]:
    """The state that `loader` is in. `keys` are counted over all ranks, so that another number of ranks can go on."""
    world_size = world_of(inner_sampler(loader))[1]
    state = {
        "version": VERSION,
        "seed": seed,
        **_must_agree(loader),
        "epoch": progress.epoch,
        "batches": progress.batches,
        "keys": progress.keys * world_size,
        "origin": dict(progress.origin),
        "failed": [list(each) for each in progress.failed],
    }
    if progress.lanes:
        state |= {"lanes": list(progress.lanes), "lane": progress.lane, "streams": list(progress.streams)}
    return state


def progress_of(loader: DataLoader[Any], state: Mapping[str, Any]) -> Progress:
    """The progress that a state tells of.

    Raises:
        StateError: the state is of a loader over other data, in other batches or with another seed.
    """
    missing = [name for name in ("version", "seed", "epoch", "batches", "keys", "origin") if name not in state]
    if missing:
        raise StateError(f"This is no state of a loaders.DataLoader: it has no {', '.join(missing)}.")
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
            "state was taken; only the number of workers, their kind, and at equal global batch the number of ranks "
            "may differ."
        )
    return Progress(
        epoch=state["epoch"],
        batches=state["batches"],
        keys=state["keys"] // world_size,
        origin=dict(state["origin"]),
        failed=[(position, index, source, error) for position, index, source, error in state.get("failed", ())],
        lanes=list(state.get("lanes", ())),
        lane=state.get("lane", 0),
        streams=list(state.get("streams", ())),
    )


def _must_agree(loader: DataLoader[Any]) -> dict[str, Any]:
    world_size = world_of(inner_sampler(loader))[1]
    if loader._plan.fetch == "stream":
        # Each worker has a stream of its own: what it holds depends on how many there are.
        return {"num_workers": loader.num_workers, "batch_size": loader.batch_size, "drop_last": loader.drop_last}
    size = None if loader.batch_size is None else loader.batch_size * world_size
    return {"length": _length(loader.dataset), "global_batch": size, "drop_last": loader.drop_last}


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None
