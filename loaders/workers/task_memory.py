"""Tasks and specs in shared memory, for worker processes to read."""

from __future__ import annotations

from dataclasses import dataclass

from loaders.batch.packing import dumps
from loaders.batch.spec import BatchSpec
from loaders.memory.blocks import Block
from loaders.memory.slots import SlotPool
from loaders.workers.messages import Task
from loaders.workers.wire import TASK_HEADER, as_keys


@dataclass
class PlacedTask:
    """A task in the arena, and those of its spans that are not reported yet (start row → stop row)."""

    task: Task
    block: Block
    nbytes: int
    lane: int
    spans: dict[int, int]


class TaskMemory:
    """Writes tasks into blocks of their own, and every spec once.

    Args:
        pool: gives the blocks.
        own: the blocks that are kept until the engine is closed; those of specs are added to it.
    """

    def __init__(self, pool: SlotPool, own: list[Block]) -> None:
        self._pool = pool
        self._own = own
        self._spec_refs: dict[int, tuple[int, int, int]] = {}
        self._specs: list[BatchSpec] = []  # held, so that their ids are not reused

    def place(self, task: Task, lane: int) -> PlacedTask:
        """Write a task.

        Raises:
            BufferMemoryError: there is no memory. Nothing has changed.
            Exception: whatever a key that cannot be pickled raises.
        """
        content = dumps(
            (
                as_keys(task.keys),
                task.position,
                task.epoch,
                task.seed,
                self._spec_ref(task.spec),
                task.blocks,
                task.stride,
                task.attempt,
                task.raw,
                task.resume,
            )
        )
        [block] = self._pool.acquire([TASK_HEADER + len(content)], bounded=False)
        buffer, at = self._pool.arena.buffer, block.offset
        buffer[at : at + TASK_HEADER] = bytes(TASK_HEADER)
        buffer[at + TASK_HEADER : at + TASK_HEADER + len(content)] = content
        return PlacedTask(task, block, len(content), lane, {})

    def cancel(self, placed: PlacedTask) -> None:
        """Set the flag that workers check before every row."""
        self._pool.arena.buffer[placed.block.offset] = 1

    def _spec_ref(self, spec: BatchSpec | None) -> tuple[int, int, int] | None:
        """(number, offset, size in bytes) of a spec in the arena."""
        if spec is None:
            return None
        if id(spec) not in self._spec_refs:
            content = dumps(spec)
            [block] = self._pool.acquire([len(content)], bounded=False)
            self._pool.arena.buffer[block.offset : block.offset + len(content)] = content
            self._own.append(block)
            self._specs.append(spec)
            self._spec_refs[id(spec)] = len(self._specs), block.offset, len(content)
        return self._spec_refs[id(spec)]
