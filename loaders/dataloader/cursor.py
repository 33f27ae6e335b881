"""The keys that a sampler yields in one epoch, and how to draw the same keys again from any point."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, SequentialSampler

from loaders.dataloader.orders import (
    RANDOM,
    bytes_of,
    from_start,
    inner_sampler,
    is_stateful,
    order_of,
    restore,
    tensor_of,
    told,
    world_of,
)
from loaders.errors import StateError
from loaders.randomness.streams import Domain, keyed_word
from loaders.sampling.base import KeyedSampler
from loaders.system.interrupts import is_interrupt

_lending = threading.RLock()  # a sampler that several loaders share is lent one generator at a time


class SamplerCursor:
    """The sampler's keys in one epoch, batch by batch. Batches can be drawn again until they are forgotten.

    What the sampler yields is stored in the same step that takes it, so an exception between any two instructions
    loses nothing: after one, `rewind` restarts at the first batch that was not forgotten.

    Args:
        sampler, batch_sampler: the loader's.
        seed: the loader's argument; None where torch's generators fix the order.
        epoch: its number.
        origin: what reproduces the order, if this epoch was begun before; else the cursor fills it in: a few numbers,
            the sampler's own state, or the state of a torch generator that the order is drawn from directly. Complete
            once the first batch was drawn.
        skip: how many of this rank's keys to skip.
        keys_in: returns the keys in one item of the user's batch sampler.
    """

    def __init__(
        self,
        sampler: Any,
        batch_sampler: Any,
        seed: int | None,
        epoch: int,
        origin: dict[str, Any],
        skip: int,
        keys_in: Callable[[Any], list[Any]] = list,
    ) -> None:
        self.sampler = inner_sampler(sampler, batch_sampler)
        self.origin = origin
        self._sampler, self._outer, self._keys_in = sampler, batch_sampler, keys_in
        self._cuts = type(batch_sampler) is BatchSampler  # we cut the sampler's keys into batches ourselves
        self._by_key = self._cuts or batch_sampler is None  # else each item drawn is a batch of the user's
        self._seed, self._epoch = seed, epoch
        # The number of keys before the items drawn but not handed out, and these items. Replaced in one assignment.
        self._kept: tuple[int, list[Any]] = (skip, [])
        self._next = 0  # index of the first item of the next batch
        self._is_drawing = False  # stays True where an exception interrupted a draw
        self._begun = False
        self._items: Iterator[Any] = iter(())
        self._order: Any = None  # what fixed the keys when this epoch was foreseen
        self._prepare(skip)

    @property
    def position(self) -> int:
        """How many of this rank's keys come before the next batch."""
        before, items = self._kept
        return before + self._count(items[: self._next])

    def next_batch(self) -> Any:
        """The keys of the next batch: a list, or what the user's batch sampler yielded.

        Raises:
            StopIteration: there are no more batches.
            StateError: a signal handler interrupted the sampler earlier, and its order cannot be repeated.
            Exception: raised by the sampler.
        """
        items = self._kept[1]
        size = self._outer.batch_size if self._cuts else 1
        drop_last = self._cuts and self._outer.drop_last
        if len(items) < self._next + size:
            self._draw(self._next + size - len(items))
        if not self._by_key and self._next < len(items):
            self._check_batch(items)
        keys = items[self._next : self._next + size]
        if not keys or (drop_last and len(keys) < size):
            raise StopIteration
        self._next += len(keys)
        return keys if self._by_key else keys[0]

    def _check_batch(self, items: list[Any]) -> None:
        """Make a list of the next batch of the user's batch sampler, unless it has a length."""
        batch = items[self._next]
        if not hasattr(batch, "__len__"):
            try:
                items[self._next] = list(batch)
            except BaseException as error:
                if not is_interrupt(error):
                    del items[self._next]
                raise

    def rewind(self) -> None:
        """Restart at the first batch that was not forgotten."""
        self._next = 0

    def forget(self, position: int) -> None:
        """Drop the batches before this position, which were handed out."""
        before, items = self._kept
        count = 0
        if self._by_key:
            count = min(position - before, len(items))
            before += max(0, count)
        while not self._by_key and count < len(items) and before < position:
            before += len(items[count])
            count += 1
        if count > 0:
            kept, following = (before, items[count:]), max(0, self._next - count)
            self._kept = kept
            self._next = following

    def following(self) -> SamplerCursor | None:
        """A cursor of the next epoch, if its keys can be computed now: without a generator, or a change of the sampler.

        Whether it was foreseen correctly is known when that epoch begins: `is_foreseen`.
        """
        if not self._by_key:
            return None
        try:
            sampler = self._sampler_of_next_epoch()
            if sampler is None or order_of(sampler) is None:
                return None
            cursor = copy.copy(self)
            cursor.sampler, cursor.origin = sampler, {}
            cursor._sampler = sampler if self._outer is None else self._sampler
            cursor._epoch += 1
            cursor._kept, cursor._next, cursor._is_drawing = (0, []), 0, False
            cursor._prepare(0)
            cursor._order = cursor._order_now()
        except Exception as error:
            if is_interrupt(error):
                raise
            return None  # the sampler's own code failed: it is raised when that epoch begins, if it does
        return cursor

    def _sampler_of_next_epoch(self) -> Any:
        """A sampler that draws as this one would in the next epoch; None if that cannot be computed."""
        sampler = self.sampler
        if isinstance(sampler, KeyedSampler) or type(sampler) is DistributedSampler:
            sampler = copy.copy(sampler)
            # If the sampler's epoch is the loader's, somebody sets it before each epoch, or this is the first.
            sampler.set_epoch(sampler.epoch + (sampler.epoch == self._epoch))
            return sampler
        # A random one is copied before it draws.
        is_computed = type(sampler) is SequentialSampler or (type(sampler) in RANDOM and self._seed is not None)
        return sampler if is_computed else None

    def is_foreseen(self, ahead: SamplerCursor) -> bool:
        """Whether `ahead`, made by `following`, draws the keys that this cursor, which has drawn none, would draw."""
        return (
            (ahead._outer is self._outer, ahead._epoch, ahead._seed) == (True, self._epoch, self._seed)
            and not self._begun
            and self._kept == (0, [])
            and ahead.origin == self.origin
            and ahead._order == self._order_now()
        )

    def replace(self, cursor: SamplerCursor) -> None:
        """Take the place of `cursor`, of which this one is foreseen."""
        if isinstance(cursor.sampler, KeyedSampler):
            cursor.sampler.follow(self.sampler)
        self._sampler, self.sampler, self.origin = cursor._sampler, cursor.sampler, cursor.origin

    def _order_now(self) -> Any:
        return order_of(self.sampler), (self._outer.batch_size, self._outer.drop_last) if self._cuts else None

    def _count(self, items: list[Any]) -> int:
        return len(items) if self._by_key else sum(map(len, items))

    def _draw(self, count: int) -> None:
        items = self._kept[1]
        if self._is_drawing:
            self._go_on()
        self._is_drawing = True
        try:
            if not self._begun:
                self._begin()
            items.extend(islice(self._items, count))  # each is stored as it is drawn
        except BaseException as error:
            if is_interrupt(error):
                raise
            del items[self._next :]  # of a batch that was not completed
            self._is_drawing = False  # its own error: it may yield more keys after it
            raise
        self._is_drawing = False

    def _go_on(self) -> None:
        """Restart where a draw was interrupted: a generator that was interrupted is exhausted."""
        before, items = self._kept
        drawn = before + self._count(items)
        if drawn and not self._is_repeatable():
            raise StateError(
                f"{type(self.sampler).__name__} was interrupted while drawing an index, and its order cannot be "
                "repeated.\n  Start a new iteration. Repeatable are samplers with state_dict() and load_state_dict(), "
                "samplers with set_epoch(), and torch's own."
            )
        self._prepare(drawn)
        self._is_drawing = False

    def _is_repeatable(self) -> bool:
        sampler = self.sampler
        known = (*RANDOM, SequentialSampler, DistributedSampler)
        return (
            isinstance(sampler, KeyedSampler)
            or type(sampler) in known
            or bool(self.origin.keys() & {"sampler", "epoch"})
            or isinstance(sampler, (list, tuple, range))
        )

    def _prepare(self, skip: int) -> None:
        """Make the iterators, and skip `skip` keys. torch also makes its own here, before it draws its base seed."""
        sampler, origin = self.sampler, self.origin
        restore(sampler, origin)
        if is_stateful(sampler):
            origin.setdefault("sampler", from_start(sampler))
            if isinstance(sampler, KeyedSampler) and self._by_key and skip:
                # It can start at any position. Positions are counted over all ranks.
                told(sampler.load_state_dict, {**origin["sampler"], "position": skip * world_of(sampler)[1]})
                skip = 0
        elif hasattr(sampler, "set_epoch") and hasattr(sampler, "epoch"):
            origin.setdefault("epoch", sampler.epoch)
        elif "before" in origin:
            sampler.generator.set_state(tensor_of(origin.pop("before")))
        self._skip = skip
        self._begun = False
        if not self._cuts:  # a BatchSampler makes its sampler's iterator when it draws the first key
            self._items = iter(self._sampler) if self._outer is None else map(self._keys_in, iter(self._outer))

    def _begin(self) -> None:
        """Draw the first key. A random sampler of torch's then draws its order, from the generator chosen here.

        A sampler without its own generator is copied with one; inside a user's batch sampler it is lent one.
        """
        sampler = self.sampler
        lent = self._lent_generator() if type(sampler) in RANDOM else None
        if lent is None:
            self._start(iter(sampler) if self._cuts else self._items)
        elif self._by_key:
            twin = copy.copy(sampler)
            twin.generator = lent
            self._start(iter(twin))
        else:
            with _lending:
                try:
                    sampler.generator = lent
                    self._start(self._items)
                finally:
                    sampler.generator = None

    def _start(self, items: Iterator[Any]) -> None:
        skip = self._skip
        if self._by_key:
            next(islice(items, skip, skip), None)
            skip = 0
        first: list[Any] = []
        while skip > 0:
            batch = next(items)
            first = [batch[skip:]] if len(batch) > skip else []
            skip -= min(skip, len(batch))
        self._items = chain(first or list(islice(items, 1)), items)
        self._begun = True

    def _lent_generator(self) -> torch.Generator | None:
        sampler, origin = self.sampler, self.origin
        given = sampler.generator
        if given is not None:
            if "generator" not in origin:
                origin["generator"] = bytes_of(given.get_state())
            given.set_state(tensor_of(origin["generator"]))
            return None
        own = torch.Generator()
        if self._seed is not None:
            own.manual_seed(keyed_word(Domain.ORDER, self._seed, self._epoch, 0))
        elif "seed" in origin:
            own.manual_seed(origin["seed"])
        elif "torch" in origin:
            own.set_state(tensor_of(origin["torch"]))
        elif type(sampler) is RandomSampler:
            # It is about to draw this seed itself: record the seed and restore the generator.
            before = torch.get_rng_state()
            origin["seed"] = int(torch.empty((), dtype=torch.int64).random_().item())
            torch.set_rng_state(before)
            return None
        else:
            origin["torch"] = bytes_of(torch.get_rng_state())
            return None
        return own
