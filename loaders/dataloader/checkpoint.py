"""Where a loader is in its epochs: what `state_dict()` gives and `load_state_dict()` takes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loaders.errors import StateError

VERSION = 2
_MAY_DIFFER = {
    False: "only the number of workers, their kind, and at equal global batch the number of ranks may differ",
    True: "of an IterableDataset only the kind of workers may differ, not their number: each has a stream of its own",
}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_failure(entry: Any) -> bool:
    if not (isinstance(entry, (list, tuple)) and len(entry) == 4):
        return False
    position, _, source, error = entry
    return _is_count(position) and (source is None or isinstance(source, str)) and isinstance(error, str)


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(map(fits, value))


_NO = object()  # nothing fits it
_FITS: dict[str, Callable[[Any], bool]] = {
    "version": _is_count,
    "seed": lambda value: value is None or (type(value) is int and 0 <= value < 1 << 63),
    "epoch": _is_count,
    "batches": _is_count,
    "keys": _is_count,
    "origin": lambda value: isinstance(value, dict) and all(isinstance(key, str) for key in value),
    "failed": lambda value: _is_list(value, _is_failure),
}
_FITS_STREAM: dict[str, Callable[[Any], bool]] = {
    "lanes": lambda value: _is_list(value, lambda lane: type(lane) is int and lane >= -1),
    "lane": _is_count,
    "streams": lambda value: isinstance(value, (list, tuple)),
}


@dataclass(frozen=True)
class Position:
    """How far one epoch was handed out. Plain numbers: nothing of it depends on how far workers are ahead.

    It never changes: whoever hands out a batch puts the next position in its place, in one step.

    Attributes:
        epoch: its number.
        batches: handed out to the caller.
        keys: of this rank, that these batches took from the sampler, failed ones included.
        origin: what makes the sampler give the same keys again (see `SamplerCursor`, which fills it).
        failed: samples that a policy left out, as (position, index, source, error).
        lanes: of an IterableDataset: per worker the number of batches handed out, or -1 where its stream has ended.
        lane: the worker whose batch is next.
        streams: per worker the dataset's own `state_dict()` after its last batch that was handed out, if it has one.
        first: among this rank's keys, the position of the first one of the batch that was handed out last.
    """

    epoch: int
    batches: int = 0
    keys: int = 0
    origin: dict[str, Any] = field(default_factory=dict)
    failed: tuple[tuple[int, Any, str | None, str], ...] = ()
    lanes: tuple[int, ...] = ()
    lane: int = 0
    streams: tuple[Any, ...] = ()
    first: int = 0


@dataclass(frozen=True)
class Agreement:
    """What a state must agree with, of a loader and its sampler.

    Attributes:
        fixed: names and values that must be equal.
        seed: the loader's own; None where it is drawn.
        world_size: over how many ranks the sampler shards.
        is_stream: for an IterableDataset; `lanes` is then how many workers read it.
    """

    fixed: Mapping[str, Any]
    seed: int | None
    world_size: int
    is_stream: bool
    lanes: int


def state_of(agreement: Agreement, position: Position, seed: int | None) -> dict[str, Any]:
    """The state at `position`. Keys are counted over all ranks, so that another number of ranks can go on."""
    state: dict[str, Any] = {
        "version": VERSION,
        "seed": seed,
        **agreement.fixed,
        "epoch": position.epoch,
        "batches": position.batches,
        "keys": position.keys * agreement.world_size,
        "origin": position.origin,
        "failed": [list(each) for each in position.failed],
    }
    if position.lanes:
        state |= {"lanes": list(position.lanes), "lane": position.lane, "streams": list(position.streams)}
    return copy.deepcopy(state)


def position_of(agreement: Agreement, state: Mapping[str, Any]) -> Position:
    """The position that a state tells of.

    Raises:
        StateError: the state is of a loader over other data, in other batches or with another seed, or is no state.
    """
    _check_shape(state)
    differences = [
        f"{name} is {state.get(name)!r} in the state and {mine!r} here"
        for name, mine in {"version": VERSION, **agreement.fixed}.items()
        if type(state.get(name)) is not type(mine) or state.get(name) != mine
    ]
    if agreement.seed is not None and state["seed"] is not None and state["seed"] != agreement.seed:
        differences.append(f"seed is {state['seed']} in the state and {agreement.seed} here")
    if state["keys"] % agreement.world_size:
        differences.append(
            f"{state['keys']} samples were delivered, which {agreement.world_size} ranks cannot share evenly"
        )
    if state["batches"] and state["seed"] is None:
        differences.append("it is of the middle of an epoch and has no seed")
    lanes = state.get("lanes", [])
    if lanes and not (agreement.is_stream and len(lanes) == len(state["streams"]) == agreement.lanes):
        differences.append(f"it has the streams of {len(lanes)} workers, and {agreement.lanes} read here")
    if lanes and state["lane"] >= len(lanes):
        differences.append(f"the next of {len(lanes)} workers is number {state['lane']}")
    if differences:
        raise StateError(
            f"This state does not fit this loader: {'; '.join(differences)}.\n  Make the loader as it was when the "
            f"state was taken; {_MAY_DIFFER[agreement.is_stream]}."
        )
    state = copy.deepcopy(dict(state))
    keys = state["keys"] // agreement.world_size
    return Position(
        epoch=state["epoch"],
        batches=state["batches"],
        keys=keys,
        origin=state["origin"],
        # A failure at or after this position will be met again.
        failed=tuple((at, index, source, error) for at, index, source, error in state["failed"] if at < keys),
        lanes=tuple(lanes),
        lane=state.get("lane", 0),
        streams=tuple(state.get("streams", ())),
    )


def _check_shape(state: Any) -> None:
    if not isinstance(state, Mapping):
        raise StateError(f"This is no state of a loaders.DataLoader, but a {type(state).__name__}.")
    expected = {**_FITS, **(_FITS_STREAM if any(name in state for name in _FITS_STREAM) else {})}
    wrong = [
        f"{name} is {state.get(name, 'missing')!r:.80}"
        for name, fits in expected.items()
        if not fits(state.get(name, _NO))
    ]
    if wrong:
        raise StateError(f"This is no state of a loaders.DataLoader: {', '.join(wrong)}.")
