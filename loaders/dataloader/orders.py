"""Where the order of a sampler comes from: its state, its epoch, a generator; and how to bring that order back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from loaders.errors import StateError
from loaders.sampling.base import KeyedSampler
from loaders.system.interrupts import is_interrupt

# These draw their order with the first key: from `generator`, or else from torch's default generator.
RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def world_of(sampler: Any) -> tuple[int, int]:
    """(rank, number of ranks) that a sampler shards over, from the attributes that our samplers and torch's have.

    Raises:
        ValueError: the attributes are not two ints with 0 <= rank < ranks.
    """
    rank = getattr(sampler, "rank", 0)
    ranks = getattr(sampler, "num_replicas", getattr(sampler, "world_size", 1))
    try:
        rank, ranks = int(rank or 0), int(ranks or 1)
    except (TypeError, ValueError):
        rank, ranks = -1, 0
    if not 0 <= rank < ranks:
        raise ValueError(
            f"{type(sampler).__name__} has rank {getattr(sampler, 'rank', 0)!r} of "
            f"{getattr(sampler, 'num_replicas', getattr(sampler, 'world_size', 1))!r} ranks: expected two ints, "
            "0 <= rank < ranks."
        )
    return rank, ranks


def inner_sampler(sampler: Any, batch_sampler: Any) -> Any:
    """The sampler that fixes the order: the batch sampler if it has its own state or epoch, else what it draws from."""
    if batch_sampler is None:
        return sampler
    has_own = hasattr(batch_sampler, "state_dict") or hasattr(batch_sampler, "set_epoch")
    if type(batch_sampler) is not BatchSampler and has_own:
        return batch_sampler
    return getattr(batch_sampler, "sampler", batch_sampler)


def order_at_rest(sampler: Any, *, drawn: bool) -> dict[str, Any]:
    """The `origin` of an epoch that has not begun. `drawn`: whether its base seed was drawn already."""
    if is_stateful(sampler):
        return {"sampler": from_start(sampler)}
    if type(sampler) in RANDOM and sampler.generator is not None:
        return {"generator" if drawn else "before": bytes_of(sampler.generator.get_state())}
    return {}


def check_origin(origin: dict[str, Any]) -> None:
    """Reject an origin that no `SamplerCursor` can have written.

    Raises:
        StateError: the message names what is wrong.
    """
    for name, value in origin.items():
        if name in ("generator", "before", "torch"):
            try:
                torch.Generator().set_state(tensor_of(value))
            except (RuntimeError, TypeError) as error:
                raise StateError(f"the state of a generator does not fit: {error}") from error
        elif name == "sampler":
            if not isinstance(value, dict):
                raise StateError(f"the state of the sampler is a {type(value).__name__}: expected a dict.")
        elif name not in ("seed", "epoch") or type(value) is not int or not -(1 << 63) <= value < 1 << 63:
            raise StateError(f"{name!r} in the origin of the order is not valid: {value!r:.80}.")


def restore(sampler: Any, origin: dict[str, Any]) -> None:
    """Set a sampler so that its next iteration is the one that `origin` describes.

    Raises:
        StateError: the sampler rejected its state.
    """
    if "sampler" in origin:
        told(sampler.load_state_dict, origin["sampler"])
    elif "epoch" in origin:
        told(sampler.set_epoch, origin["epoch"])


def told(tell: Callable[[Any], Any], what: Any) -> None:
    """Call `tell(what)`, a method of the user's sampler.

    Raises:
        StateError: it raised an error.
    """
    try:
        tell(what)
    except StateError:
        raise
    except Exception as error:
        if is_interrupt(error):
            raise
        raise StateError(f"the sampler rejected its state: {type(error).__name__}: {error}") from error


def is_stateful(sampler: Any) -> bool:
    """Whether a sampler keeps its own state."""
    return hasattr(sampler, "state_dict") and hasattr(sampler, "load_state_dict")


def from_start(sampler: Any) -> dict[str, Any]:
    """A sampler's state at the start of an epoch, even if the sampler is still at the end of the last one."""
    state = sampler.state_dict()
    try:
        state = copy.deepcopy(dict(state))
    except (TypeError, ValueError):
        raise StateError(
            f"{type(sampler).__name__}.state_dict() gave a {type(state).__name__}: expected a dict."
        ) from None
    return {**state, "position": 0} if "position" in state else state


def order_of(sampler: Any) -> Any:
    """Values that fix the next iteration of a sampler, to compare; None if it is not computed from its attributes."""
    if isinstance(sampler, KeyedSampler):
        return sampler.next_order()
    if type(sampler) not in (*RANDOM, SequentialSampler, DistributedSampler):
        return None
    fixed = dict(vars(sampler))
    if fixed.pop("generator", None) is not None:
        return None
    for name in ("data_source", "dataset"):
        if name in fixed:
            fixed[name] = len(fixed[name])
    for name in ("indices", "weights"):  # copies: they may be changed in place
        if name in fixed:
            fixed[name] = fixed[name].tolist() if isinstance(fixed[name], torch.Tensor) else list(fixed[name])
    return type(sampler), len(sampler), fixed


def bytes_of(state: torch.Tensor) -> bytes:
    """The state of a generator as it is kept in an origin."""
    return bytes(state.numpy().tobytes())


def tensor_of(state: Any) -> torch.Tensor:
    """The state of a generator as torch takes it.

    Raises:
        StateError: it is not bytes.
    """
    try:
        return torch.frombuffer(bytearray(state), dtype=torch.uint8)
    except (TypeError, ValueError) as error:
        raise StateError(f"the state of a generator is {state!r:.40}: expected bytes.") from error
