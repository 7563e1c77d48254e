"""Fetching Engram rows from the host while earlier layers compute: one worker thread, a ring of buffers, one clock.

Policies: "prefetch" starts every lookup when the forward pass begins, "serial" does it at the layer that needs it, "resident"
reads rows that lie on the compute device already. All give the same rows, bit for bit.

A lookup hashes, takes a buffer of the ring, gathers into it, and starts the copy to the device where there is one. The layer
waits, uses the rows and gives the buffer back; while all are in use the worker waits for one. Lookups are served in the order
they were asked for. A buffer too small for a lookup grows to the next power of two and keeps that size.
(reference/engram-and-overlap.md, sections 3, 4.1 and 5)
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from workbench.errors import InputError, WorkbenchError
from workbench.memory.executors import Copied, HostExecutor, Slot, executor_for
from workbench.memory.rows import RowSource

Policy = Literal["prefetch", "serial", "resident"]
POLICIES = ("prefetch", "serial", "resident")
TRAINING = "training"  # rows are read in the thread that trains, by autograd; what the model asks for when gradients are on
DEPTH = 2  # lookups that may be gathered and not yet used
BUFFER_BYTES = 2**20  # of each buffer at first
TIMEOUT_S = 60.0  # without any progress, until a layer gives up on its rows
IDLE_S = 5.0  # a worker without work ends after so long, and a new one is made when there is some


@dataclass(frozen=True, slots=True)
class Lookup:
    """What one lookup did and when, in ``time.perf_counter`` seconds: ids known, hashed, gathered; the layer's wait.

    ``memory`` lies in a buffer of the ring and is valid until the fetch is released. ``asked_s`` is when the ids were known,
    ``ids_from_s`` when work on them began; ``gather_from_s`` comes after ``hashed_s`` where no buffer was free.
    """

    layer: int
    policy: str
    rows: Tensor  # [B, T, R]
    memory: Tensor  # [B, T, R * width]
    ids_from_s: float
    asked_s: float
    started_s: float
    hashed_s: float
    gather_from_s: float
    gathered_s: float
    wait_from_s: float = 0.0
    wait_to_s: float = 0.0
    copy: Any = None  # what the executor's ``copied`` reads, once the device is done
    executor: HostExecutor | None = None

    @property
    def looked_up(self) -> bool:
        """False where the rows were at hand, so that there was no lookup to hide."""
        return self.policy != "resident"

    def copied(self) -> Copied | None:
        """When the rows were copied to the device; ask once the device has passed the layer."""
        return self.executor.copied(self.copy) if self.executor and self.copy is not None else None


class _Crew:
    """A ring of buffers and the one thread that fills them. Retired, it serves what is queued and ends."""

    def __init__(self, executor: HostExecutor, depth: int, buffer_bytes: int) -> None:
        self.executor, self.depth = executor, depth
        self.changed = threading.Condition()
        self.queue: deque[Fetch] = deque()
        self.free = [Slot() for _ in range(depth)]
        for slot in self.free:
            executor.allocate(slot, buffer_bytes)
        self.thread: threading.Thread | None = None  # the worker, kept when it ends: who waits for it needs the thread itself
        self.working = False  # the worker will look at the queue again
        self.retired = self.closed = False
        self.starved = False  # the worker waits for a buffer
        self.read_s = self.given_s = time.perf_counter()  # when the worker last began or ended a read, and a buffer came back

    @property
    def moved_s(self) -> float:
        """When what a layer waits for last moved."""
        return max(self.read_s, self.given_s) if self.starved else self.read_s

    def submit(self, fetch: Fetch) -> None:
        with self.changed:
            self.queue.append(fetch)
            if not self.working:
                self.join(None)  # an earlier worker has left the queue and is about to end
                thread = threading.Thread(target=_serve, args=(self,), name="engram-rows", daemon=True)
                thread.start()
                self.thread, self.working = thread, True
            self.changed.notify_all()

    def retire(self, *, close: bool = False) -> None:
        with self.changed:
            self.retired = True
            self.closed |= close
            self.changed.notify_all()

    def join(self, timeout_s: float | None) -> None:
        thread = self.thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)

    def take(self, fetch: Fetch, timeout_s: float | None = None) -> Slot | None:
        """A free buffer, waited for if need be; None when the fetch is not wanted any more or the ring was closed."""
        with self.changed:
            working = threading.current_thread() is self.thread
            since = time.perf_counter()
            fetch.state, self.starved = "waits for a buffer", working or self.starved
            while not self.free and not fetch.released and not self.closed:
                left = None if timeout_s is None else max(since, self.given_s) + timeout_s - time.perf_counter()
                if left is not None and left <= 0:
                    raise WorkbenchError(f"all {self.depth} staging buffers have been in use for {timeout_s:g} s")
                self.changed.wait(left)
            if working:
                self.starved, self.read_s = False, time.perf_counter()
            if fetch.released or self.closed:
                return None
            fetch.state = "reads"
            return self.free.pop()

    def give(self, slot: Slot) -> None:
        with self.changed:
            self.free.append(slot)
            self.given_s = time.perf_counter()
            self.changed.notify_all()


def _serve(crew: _Crew) -> None:
    """The worker: one lookup after the other, until there is nothing to do and nobody wants it to wait."""
    while True:
        with crew.changed:
            idle_from = time.perf_counter()
            while not crew.queue and not crew.retired and (left := idle_from + IDLE_S - time.perf_counter()) > 0:
                crew.changed.wait(left)
            if not crew.queue or crew.closed:
                crew.working = False
                for fetch in crew.queue:
                    fetch.finish(None, WorkbenchError("the fetcher was closed"))
                crew.queue.clear()
                return
            fetch = crew.queue.popleft()
        fetch.work()
        del fetch  # while the thread waits it must keep no rows alive


class Fetch:
    """A lookup under way. Use it as a context: entering waits for the rows, leaving gives their buffer back."""

    def __init__(
        self,
        layer: int,
        hash_rows: Callable[[], Tensor],
        source: RowSource,
        policy: str,
        crew: _Crew | None,
        *,
        timeout_s: float = TIMEOUT_S,
        device: torch.device,
        ids_from_s: float | None = None,
    ) -> None:
        self.layer, self.policy = layer, policy
        self.released = False
        self.state = "queued"
        self._hash_rows, self._source, self._crew = hash_rows, source, crew
        self._timeout_s, self._device = timeout_s, device
        self._asked_s = time.perf_counter()
        self._ids_from_s = self._asked_s if ids_from_s is None else ids_from_s
        self._slot: Slot | None = None
        self._lookup: Lookup | None = None
        self._error: BaseException | None = None
        self._received = False
        if policy == "prefetch" and crew is not None:
            crew.submit(self)

    def __enter__(self) -> Lookup:
        return self.result()

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def ready(self) -> bool:
        """Whether ``result`` will not have to wait."""
        return self._lookup is not None or self._error is not None

    def result(self) -> Lookup:
        """The rows, waited for; how long compute stood still is noted.

        Raises WorkbenchError naming the layer and the cause if the rows could not be read, or if nothing has moved for the
        fetcher's ``timeout_s``. A serial read of a table in memory runs in this thread, and cannot be given up.
        """
        if self._received:
            assert self._lookup is not None
            return self._lookup
        if self.released:
            raise WorkbenchError(f"the Engram rows of layer {self.layer} were given back already")
        wait_from = time.perf_counter()
        try:
            done = self._wait()
        except BaseException as error:
            self.release()
            if not isinstance(error, Exception):
                raise  # an interrupt
            cause = " ".join(str(error).split()) or type(error).__name__
            raise WorkbenchError(f"Engram rows of layer {self.layer} could not be fetched: {cause}") from error
        self._lookup, self._received = replace(done, wait_from_s=wait_from, wait_to_s=time.perf_counter()), True
        return self._lookup

    def _wait(self) -> Lookup:
        crew = self._crew
        if crew is None:  # nothing to wait for: the rows are at hand, or autograd must see them read
            return self._at_hand()
        if self.policy == "serial":
            if self._source.in_memory:
                self.work(self._timeout_s)
            else:
                crew.submit(self)  # a disk may be slow, and only another thread can be left to it
        with crew.changed:
            since = time.perf_counter()
            while self._lookup is None and self._error is None:
                left = max(since, crew.moved_s) + self._timeout_s - time.perf_counter()
                if left <= 0:
                    crew.retire()  # its thread may never come back; the next lookup gets another
                    raise WorkbenchError(self._late())
                crew.changed.wait(left)
        if self._error is not None:
            raise self._error
        assert self._lookup is not None and self._slot is not None
        crew.executor.receive(self._slot)
        return self._lookup

    def _late(self) -> str:
        if self.state == "waits for a buffer":
            return f"all {self._crew.depth if self._crew else 0} staging buffers have been in use for {self._timeout_s:g} s"
        if self.state == "queued":
            return f"an earlier lookup has not ended within {self._timeout_s:g} s"
        return f"reading them has taken more than {self._timeout_s:g} s"

    def _at_hand(self) -> Lookup:
        started = time.perf_counter()
        rows = self._hash_rows()
        hashed = time.perf_counter()
        if self.policy == "resident":
            table = self._source.resident(self._device)
            values = torch.index_select(table, 0, rows.flatten().to(table.device))
        else:
            values = self._source.gather(rows.flatten())
        memory = values.view(*rows.shape[:-1], -1)
        times = (self._ids_from_s, self._asked_s, started, hashed, hashed, time.perf_counter())
        return Lookup(self.layer, self.policy, rows, memory, *times)

    def work(self, timeout_s: float | None = None) -> None:
        """Hash, gather, start the copy: in the worker, or in the thread that asks for the result."""
        crew = self._crew
        assert crew is not None
        slot, lookup, error = None, None, None
        self.state = "reads"
        try:
            started = time.perf_counter()
            with torch.no_grad():
                rows = self._hash_rows()
                hashed = time.perf_counter()
                slot = crew.take(self, timeout_s)
                if slot is not None:
                    width, dtype = self._source.width, self._source.dtype
                    nbytes = rows.numel() * width * dtype.itemsize
                    out = crew.executor.room(slot, nbytes).view(dtype).view(-1, width)
                    gather_from = time.perf_counter()
                    self._source.gather(rows.flatten(), out=out)
                    gathered = time.perf_counter()
                    copy = crew.executor.send(slot, nbytes)
                    # Made here and not by the layer, which may be waiting.
                    memory = crew.executor.arrival(slot, nbytes).view(dtype).view(*rows.shape[:-1], rows.shape[-1] * width)
                    times = (self._ids_from_s, self._asked_s, started, hashed, gather_from, gathered)
                    lookup = Lookup(self.layer, self.policy, rows, memory, *times, copy=copy, executor=crew.executor)
        except BaseException as failure:  # whatever it is, it is for the layer to tell
            error = failure
            if not isinstance(failure, Exception) and threading.current_thread() is not crew.thread:
                self.finish(slot, None)
                raise  # an interrupt of the thread that asks
        if lookup is None and error is None:
            error = WorkbenchError("the fetcher was closed" if crew.closed else "they were given back unread")
        self.finish(slot, error, lookup)

    def finish(self, slot: Slot | None, error: BaseException | None, lookup: Lookup | None = None) -> None:
        """Publish what became of the lookup; a buffer that nobody wants goes back at once."""
        crew = self._crew
        assert crew is not None
        with crew.changed:
            self._error, self._lookup = error, lookup
            self._slot = slot
            self.state = "done"
            if slot is not None and (lookup is None or self.released):
                self._slot = None
                crew.give(slot)
            if threading.current_thread() is crew.thread:
                crew.read_s = time.perf_counter()
            crew.changed.notify_all()

    def release(self) -> None:
        """The rows are not needed any more: their buffer goes back, now or when the worker is done with it. Twice is once."""
        crew = self._crew
        if crew is None:
            self.released = True
            return
        with crew.changed:
            if self.released:
                return
            self.released = True
            slot, self._slot = self._slot, None
            if self in crew.queue:
                crew.queue.remove(self)
            if slot is not None:
                if self._received:
                    crew.executor.done(slot)
                crew.give(slot)
            crew.changed.notify_all()  # a worker that waits for a buffer for this fetch may stop


class RowFetcher:
    """Starts lookups for one model; worker and buffers are made on first use, and end with ``close`` or with the model.

    ``depth`` lookups may be ahead of their layers; ``timeout_s`` is how long a layer waits while nothing moves.
    Raises InputError for settings that are not positive.
    """

    def __init__(self, *, depth: int = DEPTH, buffer_bytes: int = BUFFER_BYTES, timeout_s: float = TIMEOUT_S) -> None:
        for name, value in (("depth", depth), ("buffer_bytes", buffer_bytes)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a positive whole number, got {value!r}")
        if not isinstance(timeout_s, int | float) or not 0 < timeout_s < math.inf:
            raise InputError(f"timeout_s must be a positive number of seconds, got {timeout_s!r}")
        self.depth, self.buffer_bytes, self.timeout_s = depth, buffer_bytes, timeout_s
        self._crew: _Crew | None = None
        self._leaving: list[_Crew] = []  # retired, and their workers may not have ended yet
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, int)  # what becomes of the worker when the fetcher is dropped; nothing yet

    def __deepcopy__(self, memo: object) -> RowFetcher:  # a copied model gets a worker of its own
        return type(self)(depth=self.depth, buffer_bytes=self.buffer_bytes, timeout_s=self.timeout_s)

    def start(
        self,
        layer: int,
        hash_rows: Callable[[], Tensor],
        source: RowSource,
        policy: str,
        device: torch.device | HostExecutor | None = None,
        ids_from_s: float | None = None,
    ) -> Fetch:
        """Begin a lookup: ``hash_rows()`` gives row numbers [B, T, R] of ``source``; the rows are wanted on ``device``, or by
        an executor. Every fetch must be released. Raises InputError for an unknown policy.
        """
        if policy not in (*POLICIES, TRAINING):
            raise InputError(f"prefetch policy {policy!r} is unknown; choose one of {POLICIES}")
        executor = device if isinstance(device, HostExecutor) else None
        place = executor.device if executor else device if isinstance(device, torch.device) else torch.device("cpu")
        crew = self._ready(place, executor) if policy in ("prefetch", "serial") else None
        settings = {"timeout_s": self.timeout_s, "device": place, "ids_from_s": ids_from_s}
        return Fetch(layer, hash_rows, source, policy, crew, **settings)  # type: ignore[arg-type]

    def _ready(self, device: torch.device, executor: HostExecutor | None) -> _Crew:
        with self._lock:
            crew = self._crew
            if crew is not None and not crew.retired:
                if crew.executor is executor or (executor is None and crew.executor.device == device):
                    return crew
                crew.retire()  # the model has moved
            self._remember(crew)
            self._crew = crew = _Crew(executor or executor_for(device), self.depth, self.buffer_bytes)
            self._end.detach()
            self._end = weakref.finalize(self, crew.retire)
            return crew

    def _remember(self, crew: _Crew | None) -> list[_Crew]:
        """The crews that were let go, this one with them, as far as their workers live."""
        self._leaving = [c for c in (*self._leaving, crew) if c is not None and c.thread is not None and c.thread.is_alive()]
        return list(self._leaving)

    def retire(self, wait_s: float = 0.0) -> None:
        """Let the worker end once it has served what is queued, and wait up to ``wait_s`` for that and for workers retired
        before; a later lookup makes another, with new buffers. For the end of a run, and after a call that broke off while a
        read may hang."""
        self._let_go(wait_s)

    def close(self) -> None:
        """Let the worker finish the read it has begun, drop what is queued, and end its thread (given ``timeout_s``)."""
        self._let_go(self.timeout_s, close=True)

    def _let_go(self, wait_s: float, *, close: bool = False) -> None:
        with self._lock:
            crew, self._crew = self._crew, None
            self._end.detach()
            leaving = self._remember(crew)
        if crew is not None:
            crew.retire(close=close)  # also where no worker lives: whoever still holds it must not wait on an idle one
        until = time.perf_counter() + wait_s
        for each in leaving:
            each.retire(close=close)
            each.join(max(0.0, until - time.perf_counter()))
