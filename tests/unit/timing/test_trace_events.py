import json
import time
from collections import defaultdict

import numpy as np
import pytest
from support.numpy_datasets import Numbers
from support.simulated_device import SimulatedDevice, SimulatedStreams

import loaders
from loaders import DataLoader, DevicePrefetcher
from loaders.timing import events
from loaders.timing.events import TraceEvent
from loaders.timing.trace import trace_events


def read(path):
    """(name of the process, name of the line, event) of every event, as a viewer would put it."""
    content = json.loads(path.read_text())
    assert content["displayTimeUnit"] == "ms"
    processes, lines, found = {}, {}, []
    for each in content["traceEvents"]:
        assert {"name", "ph", "pid", "tid"} <= set(each)
        if each["name"] == "process_name":
            processes[each["pid"]] = each["args"]["name"]
        elif each["name"] == "thread_name":
            lines[each["pid"], each["tid"]] = each["args"]["name"]
        else:
            assert each["ts"] >= 0
            assert each["ph"] == "C" or each["dur"] >= 0
            line = lines[each["pid"], each["tid"]] if each["ph"] == "X" else ""
            found.append((processes[each["pid"]], line, each))
    return found


def nested(events):
    """Name → names that it was seen directly inside of, on the same line; fails where two events cross."""
    inside, by_line = defaultdict(set), defaultdict(list)
    for process, line, event in events:
        if event["ph"] == "X":
            by_line[process, line].append(event)
    for each in by_line.values():
        above = []
        for event in sorted(each, key=lambda event: (event["ts"], -event["dur"])):
            end = event["ts"] + event["dur"]
            while above and above[-1][1] <= event["ts"] + 1e-3:
                above.pop()
            assert not above or end <= above[-1][1] + 1e-3, f"{event} crosses {above[-1]}"
            inside[event["name"].split()[0]].add(above[-1][0].split()[0] if above else None)
            above.append((event["name"], end))
    return inside


@pytest.mark.parametrize("how", [{}, {"num_workers": 2}, {"num_workers": 2, "worker_method": "thread"}], ids=str)
def test_a_trace_has_every_batch_and_every_sample_once_and_nothing_crosses(tmp_path, how):
    path = tmp_path / "run.json"
    with loaders.trace(path):
        for _ in DataLoader(Numbers(40), 4, **how):
            time.sleep(0.001)
    events = read(path)
    inside = nested(events)
    assert inside["wait"] == {"next"}
    assert inside["next"] == inside["compute"] == inside["run"] == inside["batch"] == {None}
    assert inside["filling"] == inside["ready"] == {"batch"}
    named = defaultdict(list)
    for process, line, event in events:
        named[process, event["name"].split()[0]].append((line, event))
    assert [event["args"]["batch"] for _, event in named["consumer", "next"]] == [*range(10)]
    assert sum(event["args"]["rows"] for _, event in named["workers", "run"]) == 40
    assert {line for line, _ in named["workers", "run"]} <= {"worker 0", "worker 1"}
    assert len(named["slots", "batch"]) == 10
    assert len(named["slots", "blocks"]) == 10


def test_copies_are_on_the_same_time_line(tmp_path):
    prefetcher = DevicePrefetcher(DataLoader(Numbers(40), 4), "cpu")
    prefetcher._streams = SimulatedStreams(SimulatedDevice(seed=0))
    with loaders.trace(tmp_path / "run.json"):
        list(prefetcher)
    events = read(tmp_path / "run.json")
    assert nested(events)["start"] == {"compute"}
    assert sum(event["name"] == "copy" for process, _, event in events if process == "device") == 10


def test_two_loops_at_once_do_not_cross(tmp_path):
    with loaders.trace(tmp_path / "run.json"):
        for _ in zip(DataLoader(Numbers(40), 4), DataLoader(Numbers(40), 4, num_workers=1), strict=True):
            np.zeros(1)
    nested(read(tmp_path / "run.json"))


def test_a_trace_is_written_after_an_error_too_and_costs_nothing_afterwards(tmp_path):
    def fails():
        with loaders.trace(tmp_path / "run.json"):
            next(iter(DataLoader(Numbers(8), 4)))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert read(tmp_path / "run.json")
    assert not events.traces
    with loaders.trace(tmp_path / "none.json"):
        pass
    assert read(tmp_path / "none.json") == []


def test_a_trace_that_cannot_be_written_says_so_before_the_run(tmp_path):
    with pytest.raises(FileNotFoundError), loaders.trace(tmp_path / "no folder" / "run.json"):
        pytest.fail("the run has begun")


def test_events_that_would_cross_are_drawn_on_lines_of_their_own():
    events = [TraceEvent("workers", "worker 0", "run", began, began + 10, {}) for began in (0, 5, 12)]
    drawn = [each for each in trace_events(events) if each["ph"] == "X"]
    assert [each["tid"] for each in drawn] == [1, 2, 1]
