"""What passes between the consumer and its worker processes: fixed records through pipes, all else in shared memory.

- Spans go down one pipe that all workers read (streams: one per worker). Every write is a whole number of records and
  every read asks for one, so each record reaches exactly one worker, whichever is free, without a lock.
- A worker reads a record straight into its own cell of shared memory. Receiving a span and saying that one has it are
  the same system call, so a SIGKILL can come at any instruction and the consumer still knows which span is lost.
- Results come back up one pipe. A record with a small payload is one write below PIPE_BUF, hence atomic; a large
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
STOPPED = (-1, 0)  # how the cell of that worker begins; in a fresh one all is -1
# worker serial, ticket, start row, stop row, flags, elapsed ns, payload bytes behind the record, … in the socket; the
# span's Times
DONE = struct.Struct("<20q")
# the span as it was received; then the row being read, and since when (monotonic ns)
CELL = struct.Struct("<8q")
CELL_NBYTES = 128
ROW_AT, SINCE_AT = 8, 9  # as int64 indices of a cell
CANCELLED = 1
# In a DONE record: the worker could not unpickle its job, and ends.
NO_TICKET = -1
# A channel never makes its sender wait, nor raise SIGPIPE, which would end a program that has not asked for that.
SEND_FLAGS = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)
# A record and its payload in one atomic write. PIPE_BUF is at least 4096 on Linux and 512 anywhere.
INLINE_NBYTES = 2048
# A task lies in the arena behind one int64 that turns 1 when the task is cancelled.
TASK_HEADER = 8


class Inherited:
    """A descriptor that a worker is given, whatever the start method."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __getstate__(self) -> Any:
        return DupFd(self.fd)

    def __setstate__(self, state: Any) -> None:
        self.fd = state.detach()


def as_keys(keys: Sequence[Any]) -> Any:
    """Keys as they travel: plain ints as the bytes of an int64 array, which is several times faster than a pickle."""
    if isinstance(keys, Keys):
        return keys
    if all(type(key) is int for key in keys):
        try:
            return np.array(keys, np.int64).tobytes()
        except OverflowError:
            pass
    return list(keys)


def open_pipes(count: int) -> list[tuple[int, int]]:
    """So many pipes (read end, write end), or none.

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
    """Room for many results, so that workers go on while the consumer is away; as much as the system allows."""
    try:
        import fcntl

        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 1 << 20)
    except (ImportError, AttributeError, OSError):
        pass
