import io

import numpy as np
import pytest
from rich.console import Console
from support.numpy_datasets import Numbers

import loaders
from loaders import DataLoader
from loaders.report import progress as module
from loaders.report.progress import Pace


def console(*, terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("end", ["all", "break", "error"])
def test_the_batches_come_through_as_they_are(terminal, end):
    loader, screen, seen = DataLoader(Numbers(40), 4), console(terminal=terminal), []
    try:
        for batch in loaders.progress(loader, "train", console=screen):
            seen.append(batch["label"].tolist())
            if end != "all" and len(seen) == 3:
                if end == "error":
                    raise KeyError
                break
    except KeyError:
        pass
    assert seen == [list(range(at, at + 4)) for at in range(0, 40 if end == "all" else 12, 4)]
    assert "train" in screen.file.getvalue()


def test_a_line_says_how_fast_it_is_what_it_waits_and_where_to_go_on(monkeypatch):
    now = iter(range(0, 1000))  # a second goes by whenever somebody looks
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(now))
    loader, screen = DataLoader(Numbers(40), 4), console(terminal=False)
    state = None
    for number, _ in enumerate(loaders.progress(loader, console=screen)):
        if number == 5:
            state = loader.state_dict()
    lines = screen.file.getvalue().splitlines()
    assert len(lines) > 2  # some on the way, and one at the end
    assert lines[0].startswith("epoch 0, batch 3 of 10: 2 samples/s, waits 38 %, 0:")
    assert lines[-1].startswith("epoch 0, batch 10 of 10: ")
    assert lines[-1].endswith("0:00 left")

    resumed, screen = DataLoader(Numbers(40), 4), console(terminal=False)
    resumed.load_state_dict(state)
    assert len(list(loaders.progress(resumed, console=screen))) == 4
    assert screen.file.getvalue().splitlines()[-1].startswith("epoch 0, batch 10 of 10: ")


def test_any_iterable_will_do_also_without_a_length():
    screen = console(terminal=False)
    assert list(loaders.progress((n for n in range(3)), console=screen)) == [0, 1, 2]
    assert screen.file.getvalue().startswith("batch 3: 0 samples/s")


def test_a_bar_inside_a_bar_is_no_error():
    screen = console(terminal=True)
    for _ in loaders.progress(range(3), "epochs", console=screen):
        assert list(loaders.progress(range(2), "batches", console=screen)) == [0, 1]


def test_an_epoch_behind_one_that_was_left_has_its_own_number_and_count():
    loader = DataLoader(np.zeros((40, 10), np.uint8), 4)
    seen = []
    for stop in (5, 5, 10):
        pace = Pace.of(loader)
        for step, _ in enumerate(pace.follow(loader), start=1):
            if step == stop:
                break
        seen.append((pace.epoch, pace.batch))
    assert seen == [(0, 5), (1, 5), (2, 10)]


def test_samples_that_are_not_batched_count_one_by_one():
    loader = DataLoader(np.zeros((6, 10), np.uint8), None)
    pace = Pace.of(loader)
    assert len(list(pace.follow(loader))) == pace.samples == 6
