"""What is written over torch's own streams keeps to their rules, and does without what a device lacks."""

from __future__ import annotations

import threading

import pytest
import torch
from support.streams_of_torch import DEVICE, StreamsOfTorch

from loaders import DevicePrefetcher, record_stream
from loaders.device import streams as streams_module
from loaders.device.copies import Copies
from loaders.device.copy_timer import CopyTimer
from loaders.device.side_stream import SideStream, open_side_stream
from loaders.device.streams import _NoStreams, _TorchStreams, open_streams
from loaders.errors import DeviceError
from loaders.memory.accelerator import has_pinned_memory
from loaders.outputs import collector as collector_module
from loaders.outputs.collector import Readback
from loaders.report.statistics import Transfer


@pytest.fixture
def of_torch(monkeypatch):
    return StreamsOfTorch(monkeypatch)


@pytest.fixture
def streams(of_torch):
    return _TorchStreams(SideStream(DEVICE))


class Interleaved:
    """In place of a tensor: its copy is under way in both threads at a time, and the first to begin ends first."""

    def __init__(self):
        self.turns = [threading.Event() for _ in range(3)]
        self.inside = {}

    def to(self, *_, **__):
        return self.copy_(self)

    def copy_(self, *_, **__):
        name = threading.current_thread().name
        self.inside[name] = torch.accelerator.current_stream()
        if name == "first":
            self.turns[0].set()  # the second may begin
            assert self.turns[1].wait(20)  # it has
        else:
            self.turns[1].set()
            assert self.turns[2].wait(20)  # the first has ended
        return self


@pytest.mark.parametrize("use", ["copy", "copy into", "readback"])
def test_a_thread_keeps_its_current_stream_while_another_uses_the_side_stream(streams, use):
    shared = Interleaved()
    readback = Readback(streams._side)
    copy = {
        "copy": lambda: streams.copy(shared),
        "copy into": lambda: streams.copy(shared, shared),
        "readback": lambda: readback.copy(shared, shared),
    }[use]
    kept = {}

    def run():
        name = threading.current_thread().name
        if name == "second":
            assert shared.turns[0].wait(20)
        with torch.Stream(DEVICE) as own:
            copy()
            kept[name] = torch.accelerator.current_stream() == own
        if name == "first":
            shared.turns[2].set()

    threads = [threading.Thread(target=run, name=name) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept == {"first": True, "second": True}
    assert set(shared.inside.values()) == {streams._side.stream}


def test_memory_of_the_side_stream_is_allocated_on_it_and_the_loops_stream_is_current_after(streams, monkeypatch):
    seen = []
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: seen.append(torch.accelerator.current_stream()) or empty(*a, **k)
    )
    streams.empty(4)
    assert seen == [streams._side.stream]
    assert torch.accelerator.current_stream().stream_id == 0


def test_the_time_between_two_stamps_is_told_only_when_both_are_reached(streams, of_torch):
    before, after = streams.stamp(side=False), streams.stamp(side=True)
    for late in (before, after):
        of_torch.unreached.add(late)
        assert streams.between_s(before, after) is None
        late.synchronize()
    assert streams.between_s(before, after) == 0.002
    assert streams.stamp(side=True) is not None  # torch was never asked too early


def test_a_device_that_cannot_tell_the_time_between_events_is_not_asked_again(streams, monkeypatch):
    def unsupported(*_):
        raise RuntimeError("Backend doesn't support elapsedTime.")

    monkeypatch.setattr(torch.Event, "elapsed_time", unsupported)
    assert streams.between_s(streams.stamp(side=True), streams.stamp(side=True)) is None
    assert streams.stamp(side=True) is None


def test_work_of_a_loop_that_changes_its_stream_is_not_timed(streams):
    timer = CopyTimer(streams, Transfer())
    for number in range(2):
        timer.transfer.batches = 0  # the next one is timed
        stamps = timer.begin_copy()
        timer.end_copy(stamps, 0, 1)
        timer.hand_out(stamps)
        with torch.Stream(DEVICE) if number == 0 else torch.Stream(stream_id=0):
            timer.is_worked_on()
        assert timer.transfer.timed == number


def test_without_page_locked_memory_and_record_stream_batches_come_all_the_same(streams):
    assert not has_pinned_memory()
    batches = [{"n": torch.full((3,), number)} for number in range(5)]
    prefetcher = DevicePrefetcher(batches, "cpu")
    prefetcher._streams = streams
    assert [batch["n"].tolist() for batch in prefetcher] == [[number] * 3 for number in range(5)]


def test_a_source_that_cannot_be_page_locked_is_kept_until_it_was_read(streams, of_torch):
    copies = Copies(streams, depth=1)
    source = torch.ones(3)
    assert streams.pin(source) is source
    of_torch.is_late = True
    copies.start(source, None)
    [reading] = copies._sources
    copies.release_sources(keep=1)
    assert copies._sources[0].batch is source
    reading.event.synchronize()
    copies.release_sources(keep=1)
    assert not copies._sources


def test_a_stream_without_page_locked_memory_is_a_stream_still(of_torch, monkeypatch):
    class Probe:
        device = DEVICE

        def cpu(self):
            return self

    monkeypatch.setattr(torch, "ones", lambda *_, **__: Probe())
    found = open_streams(torch.device("xpu"))
    assert isinstance(found, _TorchStreams)
    assert found.page_locker is not None


def test_a_tensor_whose_stream_torch_cannot_record_is_refused_by_name(of_torch, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "device", torch.device("xpu"))
    with pytest.raises(DeviceError, match=r"no record_stream for torch.strided tensors on 'xpu'"):
        record_stream({"n": torch.ones(1)}, torch.accelerator.current_stream())


def fails_with(error):
    def raises(*_, **__):
        raise error

    return raises


@pytest.mark.parametrize("kind", [torch.AcceleratorError, torch.OutOfMemoryError])
def test_a_device_that_has_failed_is_no_device_without_streams(of_torch, monkeypatch, kind):
    monkeypatch.setattr(torch, "Stream", fails_with(kind("the device has failed")))
    with pytest.raises(kind, match="has failed"):
        open_side_stream(DEVICE)
    monkeypatch.setattr(torch, "empty", fails_with(kind("the host has no room")))
    with pytest.raises(kind, match="no room"):
        has_pinned_memory()


@pytest.mark.parametrize("missing", ["Stream", "Event", "current stream"])
def test_a_device_that_lacks_streams_or_events_has_no_side_stream(of_torch, monkeypatch, missing):
    lacks = fails_with(RuntimeError("Backend doesn't support it."))
    if missing == "Stream":
        monkeypatch.setattr(torch, "Stream", lacks)
    elif missing == "Event":
        monkeypatch.setattr(torch.Stream, "wait_stream", lacks)
    else:
        monkeypatch.setattr(torch.accelerator, "current_stream", fails_with(ValueError("no accelerator of this type")))
    assert open_side_stream(DEVICE) is None


def test_without_page_locked_memory_results_come_by_plain_copies(of_torch, monkeypatch):
    collector_module._open_readback.cache_clear()
    assert collector_module._open_readback(DEVICE) is None
    collector_module._open_readback.cache_clear()
    monkeypatch.setattr(collector_module, "has_pinned_memory", lambda: True)
    assert isinstance(collector_module._open_readback(DEVICE), Readback)
    collector_module._open_readback.cache_clear()


def test_where_copies_cannot_be_enqueued_each_batch_is_copied_when_it_is_asked_for():
    fetched = []
    prefetcher = DevicePrefetcher((fetched.append(number) or torch.tensor(number) for number in range(4)), "cpu", 3)
    prefetcher._streams = _NoStreams(DEVICE)
    for number, batch in enumerate(prefetcher):
        assert int(batch) == number
        assert fetched == [*range(number + 1)]


@pytest.mark.parametrize("says", ["No data!", "No data", "No data.", "Why?"])
def test_what_torch_says_of_a_device_ends_as_a_sentence_does(monkeypatch, says):
    monkeypatch.setattr(streams_module.torch, "ones", fails_with(RuntimeError(says)))
    with pytest.raises(DeviceError) as caught:
        open_streams(torch.device("cuda"))
    ends = says if says[-1] in "!.?" else f"{says}."
    assert f"says: {ends}\n" in str(caught.value)


def test_has_pinned_memory_is_asked_of_torch(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    assert has_pinned_memory()
