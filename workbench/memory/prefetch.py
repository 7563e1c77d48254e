"""Fetching Engram rows from the host while earlier layers compute: one worker thread, one clock.

Policies: "prefetch" starts every lookup when the forward pass begins, "serial" does it at the layer that needs it. Both give
the same rows. (reference/engram-and-overlap.md, sections 3 and 5)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from workbench.errors import InputError, WorkbenchError

Policy = Literal["prefetch", "serial"]
POLICIES = ("prefetch", "serial")


@dataclass(frozen=True, slots=True)
class Lookup:
    """What one lookup did and when, in ``time.perf_counter`` seconds: ids known, hashed, gathered; the layer's wait."""

    layer: int
    rows: Tensor  # [B, T, R]
    memory: Tensor  # [B, T, R * width]
    asked_s: float
    started_s: float
    hashed_s: float
    gathered_s: float
    wait_from_s: float = 0.0
    wait_to_s: float = 0.0


class Fetch:
    """A lookup under way; ``result`` waits for it at the layer and notes how long compute stood still."""

    def __init__(self, layer: int, work: Callable[[], Lookup], worker: ThreadPoolExecutor | None) -> None:
        self.layer = layer
        self._work = work
        self._future: Future[Lookup] | None = worker.submit(work) if worker else None

    def result(self) -> Lookup:
        """Raises WorkbenchError if the rows could not be read."""
        wait_from = time.perf_counter()
        try:
            done = self._future.result() if self._future else self._work()
        except WorkbenchError:
            raise
        except Exception as error:
            raise WorkbenchError(f"Engram rows of layer {self.layer} could not be fetched: {error}") from error
        fields = (done.layer, done.rows, done.memory, done.asked_s, done.started_s, done.hashed_s, done.gathered_s)
        return Lookup(*fields, wait_from_s=wait_from, wait_to_s=time.perf_counter())


class RowFetcher:
    """Starts lookups for one model; its worker thread is made on first use and ends with ``close``."""

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None

    def __deepcopy__(self, memo: object) -> RowFetcher:  # a copied model gets a worker of its own
        return RowFetcher()

    def start(self, layer: int, hash_rows: Callable[[], Tensor], gather: Callable[[Tensor], Tensor], policy: str) -> Fetch:
        if policy not in POLICIES:
            raise InputError(f"prefetch policy {policy!r} is unknown; choose one of {POLICIES}")
        asked = time.perf_counter()

        def work() -> Lookup:
            started = time.perf_counter()
            rows = hash_rows()
            hashed = time.perf_counter()
            memory = gather(rows)
            return Lookup(layer, rows, memory, asked, started, hashed, time.perf_counter())

        if policy == "serial":
            return Fetch(layer, work, None)
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engram-rows")
        return Fetch(layer, work, self._worker)

    def close(self) -> None:
        """Let the worker finish what it has begun and end its thread."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
            self._worker = None
