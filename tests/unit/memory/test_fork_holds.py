"""A forked child sees the batches that its parent held: their bytes stay for as long as the child lives."""

import os
import threading

import pytest

from loaders.memory import fork_holds
from loaders.memory.arena import PAGE, Arena
from loaders.memory.slots import SlotPool

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
MB = 1 << 20


def new_pool() -> SlotPool:
    return SlotPool(Arena(256 * MB, shared=True), ceiling_nbytes=64 * MB)


def leased(pool: SlotPool, *sizes: int) -> list:
    slot = pool.acquire(sizes)
    pool.finish(slot)
    return pool.lease(slot, [f"field {number}" for number in range(len(sizes))])


class Child:
    """A forked child that holds what its parent held, until told to end; then it says what it sees there."""

    def __init__(self, look=lambda: b""):
        self._told, tell = os.pipe()
        answer, self._answer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(tell)
            os.read(self._told, 1)
            os.write(self._answer, look())
            os._exit(0)
        os.close(self._told)
        os.close(self._answer)
        self._told, self._answer = tell, answer

    def end(self) -> bytes:
        os.close(self._told)
        seen = os.read(self._answer, 100)
        os.close(self._answer)
        os.waitpid(self.pid, 0)
        return seen


def overwrite(pool: SlotPool, times: int, size: int = PAGE) -> None:
    for _ in range(times):
        slot = pool.acquire([size])
        pool.arena.buffer[slot[0].offset : slot[0].offset + 8] = b"newnewne"
        pool.discard(slot)


def test_a_batch_that_a_forked_child_inherited_is_not_overwritten_while_the_child_lives():
    pool = new_pool()
    held = leased(pool, PAGE)
    held[0][:8] = b"original"
    child = Child(lambda: held[0][:8])
    held.clear()
    overwrite(pool, 10)
    assert pool.leased_count == 1
    assert child.end() == b"original"
    overwrite(pool, 1)
    assert pool.leased_count == 0
    assert pool.arena.reserved_nbytes == 2 * PAGE
    pool.close()


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="elsewhere an open descriptor is the only sign of life")
def test_a_child_that_closes_the_descriptors_it_inherited_still_holds_its_batch():
    pool = new_pool()
    held = leased(pool, PAGE)
    held[0][:8] = b"original"
    closed, told = os.pipe()
    go, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(go, 0)
        os.dup2(told, 1)
        os.closerange(3, 4096)
        os.write(1, b"!")
        os.read(0, 1)
        os._exit(0 if held[0][:8] == b"original" else 1)
    assert os.read(closed, 1) == b"!"
    held.clear()
    overwrite(pool, 10)
    assert pool.leased_count == 1
    os.write(tell, b"!")
    assert os.waitpid(pid, 0)[1] == 0
    for fd in (closed, told, go, tell):
        os.close(fd)
    overwrite(pool, 1)
    assert pool.leased_count == 0
    pool.close()


def test_a_grandchild_holds_the_batch_although_the_child_has_ended():
    pool = new_pool()
    held = leased(pool, PAGE)
    held[0][:8] = b"original"
    go, tell = os.pipe()
    answer, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        if os.fork() == 0:
            os.close(tell)
            os.read(go, 1)
            os.write(told, held[0][:8])
        os._exit(0)
    os.close(told)
    assert os.waitpid(pid, 0)[1] == 0
    held.clear()
    overwrite(pool, 10)
    assert pool.leased_count == 1
    os.write(tell, b"!")
    assert os.read(answer, 8) == b"original"
    assert os.read(answer, 8) == b""  # the grandchild has ended
    for fd in (go, tell, answer):
        os.close(fd)
    pool.close()


def test_a_child_that_becomes_another_program_holds_nothing():
    pool = new_pool()
    held = leased(pool, PAGE)
    go, tell = os.pipe()
    os.set_inheritable(go, True)
    answer, told = os.pipe()
    os.set_inheritable(told, True)
    pid = os.fork()
    if pid == 0:
        os.dup2(go, 0)
        os.dup2(told, 1)
        os.execvp("sh", ["sh", "-c", "echo; read line"])
    assert os.read(answer, 1) == b"\n"
    held.clear()
    pool.reclaim()
    assert pool.leased_count == 0
    os.write(tell, b"\n")
    os.waitpid(pid, 0)
    for fd in (go, tell, answer, told):
        os.close(fd)
    pool.close()


def test_where_pages_cannot_be_sealed_an_open_pipe_tells_that_the_child_lives(monkeypatch):
    monkeypatch.setattr("loaders.memory.fork_holds._kind_of_sign", lambda: fork_holds._OpenPipe)
    test_a_batch_that_a_forked_child_inherited_is_not_overwritten_while_the_child_lives()
    test_every_fork_costs_a_descriptor_only_while_its_child_lives()


def test_a_batch_taken_after_the_fork_is_nobody_elses():
    pool = new_pool()
    child = Child()
    [root] = leased(pool, PAGE)
    del root
    overwrite(pool, 1)
    assert pool.leased_count == 0
    assert pool.arena.reserved_nbytes == PAGE
    child.end()
    pool.close()


def test_a_child_gives_nothing_of_its_parents_back_and_overwrites_nothing(monkeypatch):
    monkeypatch.setenv("LOADERS_DEBUG", "slots")
    pool = new_pool()
    roots = leased(pool, PAGE)
    filling = pool.acquire([PAGE])
    buffer, at = pool.arena.buffer, filling[0].offset
    buffer[at : at + 8] = roots[0][:8] = b"original"

    def tidy_up():
        roots.clear()
        pool.discard(filling)
        pool.trim()
        grandchild = Child()  # forks of forks pass through the same hooks
        grandchild.end()
        pool.close()
        return b"done"

    child = Child(tidy_up)
    assert child.end() == b"done"
    assert buffer[at : at + 8] == roots[0][:8] == b"original"
    roots.clear()
    pool.discard(filling)
    pool.close()


def test_every_fork_costs_a_descriptor_only_while_its_child_lives():
    pool = new_pool()
    held = leased(pool, PAGE)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        Child().end()
        pool.reclaim()
    assert len(os.listdir("/proc/self/fd")) == before
    held.clear()
    pool.close()


def test_a_fork_while_another_thread_uses_the_pool_leaves_the_childs_copy_unlocked():
    pool = new_pool()
    stop = threading.Event()

    def work():
        while not stop.is_set():
            pool.discard(pool.acquire([PAGE]))

    thread = threading.Thread(target=work)
    thread.start()
    seen = {Child(lambda: b"locked" if pool._lock._is_owned() else b"free").end() for _ in range(20)}
    stop.set()
    thread.join()
    assert seen == {b"free"}
    pool.close()
