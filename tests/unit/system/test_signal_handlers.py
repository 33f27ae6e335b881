"""What must not be cut off half-way is not, and no signal is lost."""

import os
import signal
import threading

import pytest

from loaders.system.interrupts import undisturbed


class ComesError(Exception):
    pass


@pytest.fixture
def calls():
    """What the handlers of SIGUSR1, which raises, and SIGUSR2 were called with."""
    calls = []

    def raises(number, frame):
        calls.append(number)
        raise ComesError

    before = (
        signal.signal(signal.SIGUSR1, raises),
        signal.signal(signal.SIGUSR2, lambda number, _: calls.append(number)),
    )
    yield calls
    signal.signal(signal.SIGUSR1, before[0])
    signal.signal(signal.SIGUSR2, before[1])


def test_a_handler_that_raises_does_so_behind_the_block(calls):
    handler = signal.getsignal(signal.SIGUSR1)
    done = []

    def work():
        with undisturbed():
            signal.raise_signal(signal.SIGUSR1)
            done.append("all")

    with pytest.raises(ComesError):
        work()
    assert (done, calls) == (["all"], [signal.SIGUSR1])
    assert signal.getsignal(signal.SIGUSR1) is handler


def test_every_signal_that_came_is_handled_although_a_handler_raises(calls):
    def work():
        with undisturbed():
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR2)

    with pytest.raises(ComesError):
        work()
    assert sorted(calls) == [signal.SIGUSR1, signal.SIGUSR2]


def test_blocks_nest(calls):
    def work():
        with undisturbed():
            with undisturbed():
                signal.raise_signal(signal.SIGUSR1)
            assert calls == []

    with pytest.raises(ComesError):
        work()
    assert calls == [signal.SIGUSR1]


def test_handlers_are_back_when_the_block_raises(calls):
    handler = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(LookupError), undisturbed():
        raise LookupError
    assert signal.getsignal(signal.SIGUSR1) is handler


def test_an_ignored_signal_stays_ignored_and_a_default_one_the_default():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with undisturbed():
            assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_another_thread_changes_no_handler(calls):
    handler = signal.getsignal(signal.SIGUSR1)
    seen = []

    def look():
        with undisturbed():
            seen.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [handler]


def test_a_child_that_is_forked_inside_has_the_usual_handlers(calls):
    handler = signal.getsignal(signal.SIGUSR1)
    with undisturbed():
        pid = os.fork()
        if pid == 0:
            os._exit(0 if signal.getsignal(signal.SIGUSR1) is handler else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_handlers_are_back_whenever_signals_come(calls):
    """A signal may come between any two steps of the block's own beginning and end."""

    def raises(number, frame):
        raise ComesError

    before = signal.signal(signal.SIGALRM, raises)
    handlers = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)]
    came = 0
    try:
        for number in range(2000):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + number % 100 * 2e-6)
                for _ in range(20):
                    with undisturbed():
                        pass
            except ComesError:
                came += 1
            assert [signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)] == handlers
            assert signal.getsignal(signal.SIGALRM) is raises
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert came > 100
