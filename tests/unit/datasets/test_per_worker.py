"""`PerWorker`: who opens, who closes, and what a fork leaves alone."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import threading

import numpy as np
import pytest
import torch

from loaders import DataLoader, PerWorker


class Handle:
    """Writes a line for each event to a file that all processes append to."""

    def __init__(self, log):
        self.log, self.pid, self.thread = log, os.getpid(), threading.get_ident()
        self.tell("open")

    def tell(self, event):
        with open(self.log, "a") as file:
            file.write(f"{event} {os.getpid()} {self.pid} {threading.get_ident()} {self.thread}\n")

    def close(self):
        self.tell("close")


class Read:
    def __init__(self, handle, count=16):
        self.handle, self.count = handle, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        handle = self.handle()
        return {"index": index, "mine": handle.pid == os.getpid(), "thread": handle.thread == threading.get_ident()}


def events(log):
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def test_nothing_is_opened_before_it_is_used_and_then_once(log):
    handle = PerWorker(Handle, log)
    assert events(log) == []
    assert handle() is handle()
    assert [event for event, *_ in events(log)] == ["open"]
    del handle
    gc.collect()
    assert [event for event, *_ in events(log)] == ["open", "close"]


def test_a_copy_opens_its_own(log):
    handle = PerWorker(Handle, log)
    first = handle()
    for other in (copy.deepcopy(handle), copy.copy(handle), pickle.loads(pickle.dumps(handle))):
        assert other() is not first
    assert repr(handle) == f"PerWorker(Handle, {log!r})"


@pytest.mark.parametrize(("method", "once"), [("fork", False), ("fork", True), ("spawn", False)])
def test_each_worker_opens_its_own_and_closes_it_at_its_end(log, method, once):
    dataset = Read(PerWorker(Handle, log, once_per_process=once))
    assert dataset[0]["mine"]  # opened here as well
    loader = DataLoader(dataset, 4, num_workers=2, multiprocessing_context=method)
    assert all(batch["mine"].all() for batch in loader)
    del loader
    gc.collect()
    by_others = [each for each in events(log) if int(each[1]) != os.getpid()]
    opened = {each[1] for each in by_others if each[0] == "open"}
    closed = [each[1] for each in by_others if each[0] == "close"]
    assert opened
    assert sorted(opened) == sorted(closed)
    assert all(pid == opener for _, pid, opener, *_ in events(log))


def test_workers_of_torch_close_theirs_too(log):
    dataset = Read(PerWorker(Handle, log))
    dataset[0]
    list(torch.utils.data.DataLoader(dataset, 4, num_workers=2, multiprocessing_context="fork"))
    assert [event for event, pid, *_ in events(log) if int(pid) != os.getpid()].count("close") == 2


@pytest.mark.parametrize("once", [False, True])
def test_threads_open_their_own_unless_once_per_process(log, once):
    dataset = Read(PerWorker(Handle, log, once_per_process=once))
    loader = DataLoader(dataset, 2, num_workers=2, worker_method="thread")
    batches = list(loader)
    assert all(batch["mine"].all() for batch in batches)
    if once:
        assert len(events(log)) == 1
        return
    assert all(batch["thread"].all() for batch in batches)
    del loader, batches
    gc.collect()
    told = events(log)
    assert sum(event == "open" for event, *_ in told) == sum(event == "close" for event, *_ in told)
    assert all(ident == opener for *_, ident, opener in told)  # each closed by the thread that opened it


def test_a_fork_closes_nothing_that_it_inherited(log):
    handle = PerWorker(Handle, log)
    handle()
    pid = os.fork()
    if pid == 0:
        handle()  # the child's own
        del handle
        gc.collect()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    told = [(event, int(by) == pid, int(opener) == pid) for event, by, opener, *_ in events(log)]
    assert told == [("open", False, False), ("open", True, True), ("close", True, True)]
    assert handle().pid == os.getpid()


def test_once_per_process_is_closed_before_a_fork_and_opened_again_after(log):
    handle = PerWorker(Handle, log, once_per_process=True)
    handle()
    process = multiprocessing.get_context("fork").Process(target=handle)
    process.start()
    process.join()
    parent = [event for event, pid, *_ in events(log) if int(pid) == os.getpid()]
    child = [event for event, pid, *_ in events(log) if int(pid) != os.getpid()]
    assert (parent, child) == (["open", "close"], ["open", "close"])
    assert handle().pid == os.getpid()


def test_a_fork_while_another_thread_opens_waits_for_it_and_can_open(log):
    entered, leave = threading.Event(), threading.Event()

    def slow():
        entered.set()
        assert leave.wait(20)
        return Handle(log)

    handle = PerWorker(slow, once_per_process=True)
    other = PerWorker(Handle, log, once_per_process=True)
    thread = threading.Thread(target=handle)
    thread.start()
    assert entered.wait(20)
    threading.Timer(0, leave.set).start()
    pid = os.fork()
    if pid == 0:
        other()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    thread.join()


def test_a_function_may_close(log):
    closed = []
    handle = PerWorker(np.zeros, 3, close=closed.append)
    array = handle()
    del handle
    gc.collect()
    assert closed[0] is array


def test_an_error_while_opening_is_raised_and_the_next_use_tries_again(tmp_path):
    handle = PerWorker(open, tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        handle()
    (tmp_path / "file").write_text("here")
    assert handle().read() == "here"
