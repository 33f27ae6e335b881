"""What the sampler gives in one epoch, and how to get the same again from any point on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from loaders.randomness.streams import Domain, keyed_word
from loaders.sampling.base import KeyedSampler
from loaders.workers.messages import keys_of

if TYPE_CHECKING:
    from loaders.dataloader.checkpoint import Progress
    from loaders.dataloader.loader import DataLoader

# These draw their order when the first key is asked for: from `generator`, or else from torch's default one.
_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def world_of(sampler: Any) -> tuple[int, int]:
    """(rank, number of ranks) that a sampler shards over, by the names that ours and torch's use."""
    ranks = getattr(sampler, "world_size", getattr(sampler, "num_replicas", 1))
    return int(getattr(sampler, "rank", 0) or 0), int(ranks or 1)


def inner_sampler(loader: Any) -> Any:
    """The sampler that fixes the order: the one that the batch sampler draws from, unless that keeps its own state."""
    batches = loader.batch_sampler
    if batches is None:
        return loader.sampler
    own = type(batches) is not BatchSampler and (hasattr(batches, "state_dict") or hasattr(batches, "set_epoch"))
    return batches if own else getattr(batches, "sampler", batches)


def order_at_rest(sampler: Any, *, drawn: bool) -> dict[str, Any]:
    """The `origin` of an epoch that has not begun. `drawn`: its base seed was drawn already."""
    if _is_stateful(sampler):
        return {"sampler": _from_start(sampler)}
    if type(sampler) in _RANDOM and sampler.generator is not None:
        return {"generator" if drawn else "before": _bytes_of(sampler.generator.get_state())}
    return {}


def restore(sampler: Any, origin: dict[str, Any]) -> None:
    """Let the next iteration of a sampler be the one that `origin` tells of.

    Raises:
        StateError: the sampler refuses its state.
    """
    if "sampler" in origin:
        sampler.load_state_dict(origin["sampler"])
    elif "epoch" in origin:
        sampler.set_epoch(origin["epoch"])


def _is_stateful(sampler: Any) -> bool:
    return hasattr(sampler, "state_dict") and hasattr(sampler, "load_state_dict")


def _from_start(sampler: Any) -> dict[str, Any]:
    """A sampler's state, at the start of an epoch also where it still stands at the end of the last one."""
    state = copy.deepcopy(dict(sampler.state_dict()))
    return {**state, "position": 0} if "position" in state else state


class KeyStream(Iterator[list[Any]]):
    """The keys of one epoch, a list per batch.

    Args:
        loader: whose sampler to follow.
        progress: how many keys to leave out, and in `origin` how the order came about, if the epoch has begun before.
            Else that is put there: a few numbers, and the state of a torch generator only where the order comes from
            one directly. Complete once the first batch was drawn.

    Attributes:
        size: how many keys the next batch gets; None where a user's batch sampler decides.
    """

    def __init__(self, loader: DataLoader[Any], progress: Progress) -> None:
        outer: Any = loader.batch_sampler
        auto = self._auto = type(outer) is BatchSampler
        self._sampler = inner_sampler(loader)
        self.size: int | None = outer.batch_size if auto else 1 if outer is None else None
        # A sample that is skipped makes room for one more, also for one of the tail.
        self._drop_last = auto and outer.drop_last and loader.on_error != "skip"
        self._seed, self._epoch = loader.seed, progress.epoch
        self.origin, self._skip = progress.origin, progress.keys
        self._keys_of = partial(keys_of, dataset=loader.dataset, whole=loader._plan.fetch == "all")
        self._drawn = False
        self._rest: list[Any] = []
        self._begin()
        # torch makes these iterators here too, before it draws its base seed; a BatchSampler only with the first key.
        self._items: Iterator[Any] = iter(()) if auto else iter(self._sampler if outer is None else outer)

    def _begin(self) -> None:
        sampler, origin = self._sampler, self.origin
        restore(sampler, origin)
        if _is_stateful(sampler):
            origin.setdefault("sampler", _from_start(sampler))
            if isinstance(sampler, KeyedSampler) and self.size is not None and self._skip:
                # It can go anywhere at once. Positions are counted over all ranks.
                sampler.load_state_dict({**origin["sampler"], "position": self._skip * world_of(sampler)[1]})
                self._skip = 0
        elif hasattr(sampler, "set_epoch") and hasattr(sampler, "epoch"):
            origin["epoch"] = sampler.epoch
        elif "before" in origin:
            sampler.generator.set_state(_tensor_of(origin.pop("before")))

    def __next__(self) -> list[Any]:
        if self._drawn:
            return self._next()
        self._drawn = True
        with self._order():
            if self._auto:
                self._items = iter(self._sampler)
            self._leave_out()
            return self._next()

    def _next(self) -> list[Any]:
        if self.size is None:
            keys, self._rest = self._rest, []
            return keys or self._keys_of(next(self._items))
        keys = list(islice(self._items, self.size))
        if not keys or (self._drop_last and len(keys) < self.size):
            raise StopIteration
        return keys

    def _leave_out(self) -> None:
        if self.size is not None:
            next(islice(self._items, self._skip, self._skip), None)
            return
        while self._skip > 0:
            self._rest = self._keys_of(next(self._items))
            self._rest, self._skip = self._rest[self._skip :], self._skip - len(self._rest)

    @contextmanager
    def _order(self) -> Iterator[None]:
        """While the first key is drawn: a random sampler of torch's draws from the generator that it should."""
        sampler, origin = self._sampler, self.origin
        if type(sampler) not in _RANDOM:
            yield
            return
        given = sampler.generator
        if given is not None and "generator" not in origin:
            origin["generator"] = _bytes_of(given.get_state())
        if given is not None:
            given.set_state(_tensor_of(origin["generator"]))
            yield
            return
        own = torch.Generator()
        if self._seed is not None:
            own.manual_seed(keyed_word(Domain.ORDER, self._seed, self._epoch, 0))
        elif "seed" in origin:
            own.manual_seed(origin["seed"])
        elif "torch" in origin:
            own.set_state(_tensor_of(origin["torch"]))
        elif type(sampler) is RandomSampler:
            # It is about to draw this seed by itself: look at it, and leave no trace.
            before = torch.get_rng_state()
            origin["seed"] = int(torch.empty((), dtype=torch.int64).random_().item())
            torch.set_rng_state(before)
            yield
            return
        else:
            origin["torch"] = _bytes_of(torch.get_rng_state())
            yield
            return
        sampler.generator = own
        try:
            yield
        finally:
            sampler.generator = None


def _bytes_of(state: torch.Tensor) -> bytes:
    return bytes(state.numpy().tobytes())


def _tensor_of(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
