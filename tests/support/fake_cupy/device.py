"""A simulated device: memory that must be allocated or pinned, and streams that run as late, or as early, as they may.

Operations are closures over raw addresses, in the queue of their stream. A synchronise runs what it depends on; how
much else runs before it, and when, is the order's choice. All of these are orders that a GPU may choose too: a program
whose result depends on the choice lacks a wait.
"""

from __future__ import annotations

import collections
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

ALIGNMENT = 512
GARBAGE = 0xFF  # NaN in each of the float formats: it survives every sum, where a tiny number would be rounded away
EDGE = 0xDB
ORDERS = ("eager", "lazy", "greedy")


class Range:
    """Memory that operations may touch: allocated, pinned or registered."""

    def __init__(self, kind: str, device: int | None, start: int, size: int, held: np.ndarray | None = None) -> None:
        """Describe memory.

        Args:
            kind: what to call it in faults.
            device: where it is; None for host memory.
            start: its address.
            size: in bytes.
            held: the bytes themselves and the edges around them, where they belong to the range.
        """
        self.kind, self.device, self.start, self.size, self.held = kind, device, start, size, held
        self.live = True
        self.mapped = False

    @classmethod
    def allocate(cls, kind: str, device: int | None, size: int) -> Range:
        """Fresh memory: aligned, full of garbage, and between edges that nobody may write."""
        held = np.full(size + 3 * ALIGNMENT, EDGE, np.uint8)
        skipped = ALIGNMENT + -held.ctypes.data % ALIGNMENT
        held[skipped : skipped + size] = GARBAGE
        return cls(kind, device, held.ctypes.data + skipped, size, held)

    def contains(self, ptr: int, size: int) -> bool:
        return self.start <= ptr and ptr + size <= self.start + self.size

    def bytes_at(self, ptr: int, size: int) -> np.ndarray:
        begin = ptr - self.held.ctypes.data
        return self.held[begin : begin + size]

    def is_intact(self) -> bool:
        """Tell whether the edges are as they were; memory that is only registered has none."""
        if self.held is None:
            return True
        begin = self.start - self.held.ctypes.data
        return bool((self.held[:begin] == EDGE).all() and (self.held[begin + self.size :] == EDGE).all())

    def __str__(self) -> str:
        return f"{self.kind} of {self.size} bytes"


class Operation:
    """Work for the device, and the memory it refers to."""

    def __init__(self, label: str, ranges: list[Range], work: Callable[[], None]) -> None:
        self.label, self.ranges, self._work = label, ranges, work

    def run(self) -> None:
        for touched in self.ranges:
            assert touched.live, f"{self.label} runs after the {touched} was freed"
        self._work()


class Mark:
    """A point in a queue: one record of an event, or where a synchronise begins."""

    def __init__(self, queue: Queue) -> None:
        self.queue, self.done = queue, False


class Wait:
    """Nothing behind it in its queue runs before the mark is reached."""

    def __init__(self, mark: Mark) -> None:
        self.mark = mark


class Queue:
    """What a stream has yet to do, in order. It outlives its stream until it is empty, as the work of a real one."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.entries: collections.deque[Operation | Mark | Wait] = collections.deque()
        self.closed = False
        self.favour = 1.0

    def blocker(self) -> Mark | None:
        """Return the mark that the first entry waits for, if it is not reached."""
        head = self.entries[0]
        return head.mark if isinstance(head, Wait) and not head.mark.done else None

    def step(self) -> None:
        """Run the first entry, which must not be blocked."""
        entry = self.entries.popleft()
        if isinstance(entry, Operation):
            entry.run()
        elif isinstance(entry, Mark):
            entry.done = True


class Streams:
    """Every queue, and the order in which they run. Callers hold the lock.

    - eager: everything at once, as on a device that is infinitely fast.
    - lazy: a synchronise runs what it depends on and nothing else.
    - greedy: a synchronise first runs the other queues, as far as their waits allow.
    - ("random", seed): some order, which favours some queues; with most seeds a submit also runs operations.
    """

    def __init__(self, order: str | tuple[str, int]) -> None:
        name, seed = order if isinstance(order, tuple) else (order, None)
        assert name in ORDERS or (name == "random" and seed is not None), f"{order!r} is no order"
        self._name, self._random = name, random.Random(seed)
        self._eagerness = self._random.choice((0.0, 0.02, 0.2))
        self._queues: list[Queue] = []

    def open(self, device: int) -> Queue:
        queue = Queue(device)
        queue.favour = self._chance()
        self._queues = [old for old in self._queues if old.entries or not old.closed] + [queue]
        return queue

    def of_device(self, device: int) -> list[Queue]:
        return [queue for queue in self._queues if queue.device == device]

    def submit(self, queue: Queue, entry: Operation | Mark | Wait) -> None:
        queue.entries.append(entry)
        if self._name == "eager":
            queue.step()
        elif self._name == "random" and self._random.random() < self._eagerness:
            for _ in range(self._random.randint(1, 8)):
                self._step_any()

    def wait(self, queue: Queue, mark: Mark) -> None:
        self.submit(queue, Wait(mark))

    def mark(self, queue: Queue) -> Mark:
        mark = Mark(queue)
        self.submit(queue, mark)
        return mark

    def complete(self, mark: Mark) -> None:
        """Run until the mark is reached."""
        if self._name == "greedy" and not mark.done:
            self._run_others(mark.queue)
        if self._name == "random":
            for queue in self._random.sample(self._queues, len(self._queues) // 4):
                queue.favour = self._chance()
            while not mark.done:
                self._step_any()
        self._run_needed(mark)

    def pending(self, touched: Range) -> list[str]:
        """Name the operations that refer to memory and have not run."""
        waiting = [entry for queue in self._queues for entry in tuple(queue.entries)]
        return [entry.label for entry in waiting if isinstance(entry, Operation) and touched in entry.ranges]

    @staticmethod
    def _run_needed(mark: Mark) -> None:
        """Run the mark's queue up to it, and before each wait what that needs: a loop, for chains are long."""
        wanted = [mark]
        while wanted:
            if wanted[-1].done:
                wanted.pop()
            elif blocker := wanted[-1].queue.blocker():
                wanted.append(blocker)
            else:
                wanted[-1].queue.step()

    def _run_others(self, kept: Queue) -> None:
        progress = True
        while progress:
            progress = False
            for queue in self._queues:
                while queue is not kept and queue.entries and not queue.blocker():
                    queue.step()
                    progress = True

    def _step_any(self) -> None:
        ready = [queue for queue in self._queues if queue.entries and not queue.blocker()]
        if ready:
            self._random.choices(ready, [queue.favour for queue in ready])[0].step()

    def _chance(self) -> float:
        """Draw how likely a queue runs: some are so slow that they run only when nothing else can."""
        return 10.0 ** -self._random.uniform(0, 4)


class Memories:
    """Every live range, of all devices and of the host. Faults are kept: most are found where nothing can be raised."""

    def __init__(self, lock: threading.RLock, streams: Streams, memory_bytes: int) -> None:
        self._lock, self._streams = lock, streams
        self.memory_bytes = memory_bytes
        self.ranges: list[Range] = []
        self.faults: list[str] = []
        self.allocations = 0

    def used_bytes(self, kind: str, device: int | None = None) -> int:
        """Add up what lives, of every device where none is given."""
        return sum(known.size for known in tuple(self.ranges) if known.kind == kind and device in (None, known.device))

    def add(self, added: Range) -> Range:
        """Begin a range. Memory that is registered and yet given out again has been freed under its registration."""
        with self._lock:
            for known in tuple(self.ranges):
                if known.start < added.start + added.size and added.start < known.start + known.size:
                    self.faults.append(f"{known} given back to the host while registered")
                    self.ranges.remove(known)
            self.ranges.append(added)
        return added

    def free(self, freed: Range) -> None:
        """End a range. It is a fault that operations still refer to it, or that its edges were written."""
        with self._lock:
            self.faults += [f"{freed} freed while pending: {label}" for label in self._streams.pending(freed)]
            self._examine(freed)
            freed.live = False
            self.ranges = [known for known in self.ranges if known is not freed]
            if freed.held is not None:
                freed.held[...] = GARBAGE

    def check(self) -> None:
        """Assert that there were no faults."""
        with self._lock:
            for known in tuple(self.ranges):
                self._examine(known)
            assert not self.faults, "; ".join(self.faults)

    def on_device(self, device: int, ptr: int, size: int) -> Range:
        found = self.find(ptr, size)
        assert found is not None and found.device is not None, f"{size} bytes at {ptr:#x} are no memory of a device"
        assert found.device == device, f"the {found} is on device {found.device}, not on {device}"
        return found

    def on_host(self, ptr: int, size: int) -> Range:
        found = self.find(ptr, size)
        assert found is not None, f"pageable memory in an asynchronous copy: {size} bytes at {ptr:#x}"
        assert found.device is None, f"the {found} is on device {found.device}, not on the host"
        return found

    def overlapping(self, ptr: int, size: int) -> bool:
        return any(known.start < ptr + size and ptr < known.start + known.size for known in tuple(self.ranges))

    def find(self, ptr: int, size: int) -> Range | None:
        return next((known for known in tuple(self.ranges) if known.contains(ptr, size)), None)

    def _examine(self, known: Range) -> None:
        if not known.is_intact():
            self.faults.append(f"written beyond the ends of the {known}")


class Failures:
    """Errors that the next operations of a kind raise."""

    OPERATIONS = ("malloc", "PinnedMemory", "hostRegister", "copy", "memset", "kernel", "Module", "synchronize")
    OPERATIONS += ("ipcGetMemHandle",)

    def __init__(self) -> None:
        self._planned: dict[str, list[Any]] = {operation: [] for operation in self.OPERATIONS}
        self.poisoned: Any = None

    def config(self, operation: str, error: BaseException, after: int = 0) -> None:
        """Make an operation raise an error, once, after so many that do not."""
        assert operation in self._planned, f"{operation!r} is none of {', '.join(self.OPERATIONS)}"
        self._planned[operation] += [None] * after + [error]

    def awaits(self, operation: str) -> bool:
        """Tell whether such an operation fails, now or after others."""
        return self.poisoned is not None or bool(self._planned[operation])

    def poison(self, error: Any) -> None:
        """Make every operation fail from now on, as after an illegal address."""
        self.poisoned = error

    def meet(self, operation: str) -> None:
        if self.poisoned is not None:
            raise type(self.poisoned)(self.poisoned.status)
        planned = self._planned[operation]
        error = planned.pop(0) if planned else None
        try:
            if error is not None:
                raise error
        finally:
            del error  # its trace would hold this frame, and with it whatever memory the operation was for
