"""What cuts a call of the prefetcher's iterator short, the next call goes on from: no batch is lost or comes twice."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from support.batches import CountingLoader
from support.simulated_device import SimulatedDevice, SimulatedStreams, prefetch

from loaders import DevicePrefetcher, sample_rng
from loaders.device import copies as copies_module
from loaders.device import prefetcher as prefetcher_module
from loaders.errors import DeviceError

BATCHES = 6


class Interrupt(BaseException):
    """As KeyboardInterrupt, which pytest would take for itself."""


def interrupted_everywhere(make, files):
    """Run an iteration once for each line of `files` that it executes, interrupted there; yields the line's number.

    Not in `__next__` itself: a trace function may raise on the way out of a `with`, where no signal's handler runs.
    """
    at = 0
    while True:
        lines = 0
        is_done = False

        def on_line(frame, event, argument, at=at):
            nonlocal lines, is_done
            if event == "line" and frame.f_code.co_filename in files and frame.f_code.co_name != "__next__":
                lines += 1
                if lines > at and not is_done:
                    is_done = True
                    raise Interrupt
            return on_line

        batches, seen = make()
        while True:
            sys.settrace(on_line if not is_done else None)
            try:
                batch = next(batches)
            except Interrupt:
                continue
            except StopIteration:
                break
            finally:
                sys.settrace(None)
            seen(batch)
        if not is_done:
            return
        yield at
        at += 1


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_an_iteration_interrupted_at_any_line_goes_on_with_every_batch(static, depth):
    found = []
    device = SimulatedDevice(0)

    def make():
        nonlocal device
        found.clear()
        device = SimulatedDevice(0)
        prefetcher = DevicePrefetcher(CountingLoader(BATCHES), "cpu", depth, lambda batch: (batch, keyed()), static)
        prefetcher._streams = SimulatedStreams(device)
        return iter(prefetcher), lambda batch: device.launch(
            lambda array, key=batch[1]: found.append((int(array[0]), key)), batch[0]
        )

    def keyed():
        return int(sample_rng().integers(1 << 30))

    torch.manual_seed(0)
    whole = None
    runs = 0
    files = {prefetcher_module.__file__, copies_module.__file__}
    for at in interrupted_everywhere(make, files):
        device.drain()
        assert device.late_reads == 0, f"line {at}"
        assert [number for number, _ in found] == [*range(BATCHES)], f"line {at}"
        whole = whole or list(found)
        assert found == whole, f"line {at}: other randomness"
        runs += 1
    assert runs > 200


def all_that_comes(batches):
    """What each call gives or raises, until the end."""
    came = []
    while len(came) < 20:
        try:
            batch = next(batches)
        except (ValueError, TimeoutError, DeviceError, Interrupt) as error:
            came.append(str(error).partition(":")[0])
        except StopIteration:
            break
        else:
            came.append(int(batch[0]))
    return came


def test_an_error_of_the_loader_does_not_end_what_can_go_on():
    class Loader:
        def __iter__(self):
            self.at = -1
            return self

        def __next__(self):
            self.at += 1
            if self.at == 3:
                raise TimeoutError("a handler's")
            if self.at == BATCHES:
                raise StopIteration
            return torch.tensor([self.at])

    device = SimulatedDevice(0)
    batches = iter(prefetch(device, Loader(), transform=lambda batch: (device.drain(), batch)[1]))
    assert all_that_comes(batches) == [0, 1, 2, "a handler's", 4, 5]
    assert next(batches, None) is None


@pytest.mark.parametrize(
    ("error", "times", "changes", "expected"),
    [
        (TimeoutError, 1, False, [0, "failed", 1, 2]),  # as when a handler of a signal raised it
        (ValueError, 9, False, [0, "failed", "failed", 2]),  # the transform's own
        (ValueError, 1, True, [0, "failed", 2]),  # what was changed in part is not changed again
        (Interrupt, 3, False, [0, "failed", "failed", "failed", 1, 2]),
        (Interrupt, 1, True, [0, "failed", "a batch is lost", 2]),
    ],
)
def test_a_batch_whose_transform_failed_is_tried_again_if_it_is_unchanged(error, times, changes, expected):
    left = times

    def transform(batch):
        nonlocal left
        device.drain()
        if int(batch[0]) == 1 and left:
            left -= 1
            if changes:
                batch.mul_(1)
            raise error("failed")
        return batch

    device = SimulatedDevice(0)
    assert all_that_comes(iter(prefetch(device, CountingLoader(3), transform=transform))) == expected


def test_on_the_cpu_an_error_of_the_transform_ends_nothing_either():
    fails = [True, False, False]

    def transform(batch):
        if fails.pop(0):
            raise ValueError("this batch")
        return batch

    batches = iter(DevicePrefetcher(CountingLoader(3), "cpu", transform=transform))
    with pytest.raises(ValueError, match="this batch"):
        next(batches)
    assert [int(batch[0]) for batch in batches] == [1, 2]


def test_threads_that_share_an_iterator_get_each_batch_once():
    class Slow(SimulatedStreams):
        """Gives other threads their chance in the middle of a call."""

        def compute_waits_for(self, event):
            inside.append(threading.get_ident())
            start.wait(20)
            assert inside.pop() == threading.get_ident()
            assert not inside

    inside, came, start = [], [], threading.Event()
    prefetcher = DevicePrefetcher(CountingLoader(40), "cpu")
    prefetcher._streams = Slow(SimulatedDevice(0))
    batches = iter(prefetcher)
    threads = [threading.Thread(target=lambda: came.extend(int(batch[0]) for batch in batches)) for _ in range(4)]
    for thread in threads:
        thread.start()
    start.set()
    for thread in threads:
        thread.join()
    prefetcher._streams.device.drain()
    assert len(came) == 40


def test_a_call_from_within_a_call_is_refused_at_once():
    asked = []

    def transform(batch):
        with pytest.raises(RuntimeError, match="called while it runs"):
            next(batches)
        asked.append(True)
        return batch

    batches = iter(prefetch(SimulatedDevice(0), CountingLoader(2), transform=transform))
    assert len(list(batches)) == 2
    assert asked == [True, True]


def test_asking_an_iterator_that_is_over_leaves_the_state_of_the_next_one_alone():
    class Stateful(CountingLoader):
        def state_dict(self):
            return {"n": 1}

    prefetcher = prefetch(SimulatedDevice(0), Stateful(5))
    over = iter(prefetcher)
    list(over)
    current = iter(prefetcher)
    next(current)
    position = prefetcher._delivered
    assert next(over, None) is None
    assert prefetcher._delivered is position is not None
