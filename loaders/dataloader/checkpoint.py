"""The position of a loader in its epochs: what `state_dict()` returns and `load_state_dict()` takes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from loaders.errors import StateError

VERSION = 2
_MAY_DIFFER = {
    False: "only the number and kind of workers and, at equal global batch size, the number of ranks may differ",
    True: "for an IterableDataset only the kind of workers may differ, not their number: each reads its own stream",
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


_NO = object()  # stands for a missing entry: fails every check
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


class Position(NamedTuple):
    """How much of one epoch was handed out. It does not depend on how far the workers are ahead.

    Handing out a batch replaces it with the next position in one assignment.

    Attributes:
        epoch: its number.
        batches: how many were handed out.
        keys: how many of this rank's keys are used up, those of failed samples included.
        origin: what makes the sampler yield the same keys again (see `SamplerCursor`, which fills it).
        failed: samples that `on_error` left out, as (position, index, source, error).
        lanes: for an IterableDataset: batches handed out per worker, or -1 where its stream has ended.
        lane: the worker whose batch is next.
        streams: per worker the dataset's own `state_dict()` after the last batch handed out; None without one.
        first: the position, among this rank's keys, of the first one in the batch that was handed out last.
    """

    epoch: int
    batches: int
    keys: int
    origin: dict[str, Any]
    failed: tuple[tuple[int, Any, str | None, str], ...] = ()
    lanes: tuple[int, ...] = ()
    lane: int = 0
    streams: tuple[Any, ...] = ()
    first: int = 0

    @classmethod
    def start(cls, epoch: int) -> Position:
        """Before the first batch of an epoch."""
        return cls(epoch, 0, 0, {})


@dataclass(frozen=True)
class Agreement:
    """The properties of a loader and its sampler that a state must match.

    Attributes:
        fixed: names and values that must be equal.
        seed: the loader's argument; None where it is drawn.
        world_size: how many ranks the sampler shards over.
        is_stream: whether the dataset is an IterableDataset; `lanes` is then the number of workers, else 0.
    """

    fixed: Mapping[str, Any]
    seed: int | None
    world_size: int
    is_stream: bool
    lanes: int


def state_of(agreement: Agreement, position: Position, seed: int | None) -> dict[str, Any]:
    """The state at `position`. Keys are counted over all ranks, so that another number of ranks can resume."""
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
    """The position that a state holds.

    Raises:
        StateError: the state is from a loader over other data, with other batches or another seed, or is not a state.
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
        differences.append("it was taken inside an epoch but has no seed")
    lanes = state.get("lanes", [])
    if lanes and not (agreement.is_stream and len(lanes) == len(state["streams"]) == agreement.lanes):
        differences.append(f"it has the streams of {len(lanes)} workers, but {agreement.lanes} read here")
    if lanes and state["lane"] >= len(lanes):
        differences.append(f"it has {len(lanes)} workers, but the next one is number {state['lane']}")
    if differences:
        raise StateError(
            f"This state does not fit this loader: {'; '.join(differences)}.\n  Create the loader with the same "
            f"arguments as when the state was taken; {_MAY_DIFFER[agreement.is_stream]}."
        )
    state = copy.deepcopy(dict(state))
    keys = state["keys"] // agreement.world_size
    return Position(
        epoch=state["epoch"],
        batches=state["batches"],
        keys=keys,
        origin=state["origin"],
        # Failures at or after this position will occur again.
        failed=tuple((at, index, source, error) for at, index, source, error in state["failed"] if at < keys),
        lanes=tuple(lanes),
        lane=state.get("lane", 0),
        streams=tuple(state.get("streams", ())),
    )


def _check_shape(state: Any) -> None:
    if not isinstance(state, Mapping):
        raise StateError(f"This is not a state of a loaders.DataLoader but a {type(state).__name__}.")
    expected = {**_FITS, **(_FITS_STREAM if any(name in state for name in _FITS_STREAM) else {})}
    wrong = [
        f"{name} is {state.get(name, 'missing')!r:.80}"
        for name, fits in expected.items()
        if not fits(state.get(name, _NO))
    ]
    if wrong:
        raise StateError(f"This is not a state of a loaders.DataLoader: {', '.join(wrong)}.")
