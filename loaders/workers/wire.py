"""The transport between the consumer and its worker processes: fixed records in pipes, the rest in shared memory.

- Spans go through one pipe that all workers read (streams: one per worker). Every write is a whole number of records
  and every read asks for one, so each record reaches exactly one worker, whichever is free, without a lock.
- A worker reads a record straight into its own cell of shared memory. Receiving a span and recording who has it are
  one system call, so a SIGKILL can come at any instruction and the consumer still knows which span is lost.
- Results come back through one pipe. A record with a small payload is one write below PIPE_BUF, hence atomic; a large
  payload follows through the worker's own socket.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np

from loaders.workers.messages import Keys

# ticket, start row, stop row, offset and size of the task in the arena, three spare
SPAN = struct.Struct("<8q")
# The record that stops the worker that reads it.
STOP = SPAN.pack(-1, 0, 0, 0, 0, 0, 0, 0)
STOPPED = (-1, 0)  # the start of that worker's cell; a fresh cell is all -1
# worker serial, ticket, start row, stop row, flags, elapsed ns, payload bytes after the record, payload bytes in the
# socket; the span's Times
DONE = struct.Struct("<20q")
# the span as it was received; then the row being read, and since when (monotonic ns)
CELL = struct.Struct("<8q")
CELL_NBYTES = 128
ROW_AT, SINCE_AT = 8, 9  # as int64 indices of a cell
CANCELLED = 1
# In a DONE record: the worker could not unpickle its job, and ends.
NO_TICKET = -1
# Sending through a channel never blocks, and never raises SIGPIPE, which by default would end the program.
SEND_FLAGS = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)
# Payloads up to this size share one atomic write with their record. PIPE_BUF is 4096 on Linux, at least 512 elsewhere.
INLINE_NBYTES = 2048
# In the arena a task follows an int64 that becomes 1 when the task is cancelled.
TASK_HEADER = 8


class Inherited:
    """A descriptor that is passed to a worker under any start method."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __getstate__(self) -> Any:
        return DupFd(self.fd)

    def __setstate__(self, state: Any) -> None:
        self.fd = state.detach()


def as_keys(keys: Sequence[Any]) -> Any:
    """Keys in the form to pickle: plain ints as the bytes of an int64 array, several times faster than a list."""
    if isinstance(keys, Keys):
        return keys
    if all(type(key) is int for key in keys):
        try:
            return np.array(keys, np.int64).tobytes()
        except OverflowError:
            pass
    return list(keys)


def open_pipes(count: int) -> list[tuple[int, int]]:
    """`count` pipes (read end, write end), or none.

    Raises:
        OSError: there are not enough descriptors.
    """
    pipes: list[tuple[int, int]] = []
    try:
        pipes.extend(os.pipe() for _ in range(count))
    except OSError:
        for fd in itertools.chain(*pipes):
            os.close(fd)
        raise
    return pipes


def widen_pipe(fd: int) -> None:
    """Make room for many results, so that workers continue while the consumer is busy; if the system allows it."""
    try:
        import fcntl

        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 1 << 20)
    except (ImportError, AttributeError, OSError):
        pass
