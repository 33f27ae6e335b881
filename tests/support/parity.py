"""Two loaders side by side: everything that a caller can see of an iteration, recorded and compared."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import numpy as np
import torch

import loaders

ENGINES: dict[str, dict[str, Any]] = {
    "inline": {"num_workers": 0},
    "process": {"num_workers": 2, "multiprocessing_context": "fork"},
    "thread": {"num_workers": 2, "worker_method": "thread"},
}
# An iterator that goes on forever after an error is stopped here.
_MOST_EVENTS = 40
# torch emits these once per process; Python 3.12 emits the last one at every fork of a threaded process.
_NOT_THE_LOADERS = ("The given NumPy array is not writable", "Creating a tensor from a list of numpy", "This process")


@dataclass
class Seen:
    """What a caller saw.

    Attributes:
        epochs: per epoch the batches, and the exceptions that `next` or `iter` raised.
        lengths: `len(loader)` before and after, or the type of what it raised.
        warned: (category, message) of each warning.
        states: of Python's, NumPy's and torch's generator and of the loader's own.
    """

    epochs: list[list[Any]] = field(default_factory=list)
    lengths: list[Any] = field(default_factory=list)
    warned: list[tuple[type, str]] = field(default_factory=list)
    states: tuple[Any, ...] = ()


def watch(make: Callable[[], Any], *, epochs: int = 1, length: bool = True) -> Seen:
    """Build a loader and iterate it to the end, past every exception, from known random states."""
    seen = Seen()
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = make()
        if length:
            seen.lengths.append(_length(loader))
        for _ in range(epochs):
            seen.epochs.append(events_of(loader))
        if length:
            seen.lengths.append(_length(loader))
    messages = [(each.category, str(each.message)) for each in caught]
    seen.warned = [each for each in messages if not each[1].startswith(_NOT_THE_LOADERS)]
    own = loader.generator.get_state() if loader.generator is not None else None
    seen.states = (random.getstate(), np.random.get_state(), torch.get_rng_state(), own)
    return seen


def _length(loader: Any) -> Any:
    try:
        return len(loader)
    except Exception as error:  # its type is compared
        return type(error)


def events_of(loader: Any) -> list[Any]:
    """One epoch: what `next` gave, and what it raised."""
    events: list[Any] = []
    try:
        iterator = iter(loader)
    except Exception as error:  # its type is compared
        return [error]
    while len(events) < _MOST_EVENTS:
        try:
            events.append(next(iterator))
        except StopIteration:  # but not after an exception: what follows it is compared, too
            break
        except Exception as error:  # its type is compared
            # Its frames would keep the iterator and its workers alive.
            events.append(error.with_traceback(None))
    return events


def ours_and_theirs(dataset: Any, engine: str, *, epochs: int = 1, **arguments: Any) -> tuple[Seen, Seen]:
    """What is seen of one dataset with the same arguments in our loader and in torch's; torch's has no workers."""
    theirs = watch(lambda: torch.utils.data.DataLoader(dataset, **arguments), epochs=epochs)
    return watch(lambda: loaders.DataLoader(dataset, **arguments, **ENGINES[engine]), epochs=epochs), theirs


def assert_same_seen(ours: Seen, theirs: Seen, *, ordered: bool = True) -> None:
    """Everything is equal, and our exceptions are instances of the types that torch raises."""
    assert ours.lengths == theirs.lengths
    assert len(ours.epochs) == len(theirs.epochs)
    for number, (mine, other) in enumerate(zip(ours.epochs, theirs.epochs, strict=True)):
        assert len(mine) == len(other), f"epoch {number}: {mine} and {other}"
        if not ordered:
            mine, other = sorted(mine, key=repr), sorted(other, key=repr)
        for position, (a, b) in enumerate(zip(mine, other, strict=True)):
            assert_same(a, b, f"epoch {number}, batch {position}")
    # Only the first words: the rest of ours differs.
    assert [(kind, text.split()[:3]) for kind, text in ours.warned] == [
        (kind, text.split()[:3]) for kind, text in theirs.warned
    ]
    assert_same(ours.states, theirs.states, "generators")


def assert_same(ours: Any, theirs: Any, where: str = "batch") -> None:
    """Equal in type, structure, dtype, shape and every bit."""
    if isinstance(theirs, Exception):
        assert isinstance(ours, type(theirs)), f"{where}: {ours!r}, torch raises {theirs!r}"
        return
    assert type(ours) is type(theirs), f"{where}: {type(ours)} ({ours!r}), torch gives {type(theirs)} ({theirs!r})"
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype, where
        assert ours.shape == theirs.shape, where
        assert ours.requires_grad == theirs.requires_grad, where
        assert ours.layout == theirs.layout, where
        if theirs.layout == torch.strided:
            assert ours.is_contiguous() or not theirs.is_contiguous(), where
            channels_last = theirs.dim() == 4 and theirs.is_contiguous(memory_format=torch.channels_last)
            assert not channels_last or ours.is_contiguous(memory_format=torch.channels_last), where
        mine, other = ours.detach().to_dense(), theirs.detach().to_dense()
        assert torch.equal(mine.isnan(), other.isnan()), where
        assert torch.equal(mine.nan_to_num(), other.nan_to_num()), f"{where}: {ours}, torch gives {theirs}"
    elif isinstance(theirs, np.ndarray):
        assert ours.dtype == theirs.dtype, where
        assert ours.shape == theirs.shape, where
        np.testing.assert_array_equal(ours, theirs, err_msg=where)
    elif isinstance(theirs, Mapping):
        assert list(ours) == list(theirs), where
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{where}[{key!r}]")
        assert getattr(ours, "default_factory", None) == getattr(theirs, "default_factory", None), where
    elif isinstance(theirs, Sequence) and not isinstance(theirs, (str, bytes)):
        assert len(ours) == len(theirs), where
        for position, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}[{position}]")
    elif is_dataclass(theirs):
        assert_same(vars(ours), vars(theirs), where)
    else:
        assert ours == theirs or (ours != ours and theirs != theirs), where  # NaN does not equal itself


def told(error: BaseException) -> str:
    """All text of an exception: its message, its notes, and its cause's message."""
    cause = error.__cause__
    return "\n".join([str(error), *getattr(error, "__notes__", []), str(cause) if cause is not None else ""])
