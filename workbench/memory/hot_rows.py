"""A bounded cache of rows in front of a table whose rows cost a page read each: n-grams of real text follow Zipf's law.

For a table in memory this costs more than it saves; it is for tables on a disk that memory cannot hold, where one row of 264
bytes costs a page of 4,096. (reference/engram-and-overlap.md, sections 3, "Cache term", and 5)
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.errors import InputError
from workbench.memory.table import EngramTable
from workbench.memory.table_file import PAGE

WAYS = 8  # places where a row may lie
NOTHING = -1


@dataclass(frozen=True, slots=True)
class HotRowCounts:
    """What went through a cache so far. Bytes count whole pages, as a disk is read; see ``EngramTable.pages``."""

    asked: int = 0  # rows asked for
    distinct: int = 0  # of those, different ones within their call
    read: int = 0  # rows that had to be read from the table
    read_bytes: int = 0  # of pages that hold them
    plain_bytes: int = 0  # what the same calls would read without a cache: the pages of all rows they ask for

    @property
    def hit_rate(self) -> float:
        """Share of the distinct rows that were there already."""
        return 1 - self.read / self.distinct if self.distinct else 0.0

    @property
    def saved(self) -> float:
        """Share of the rows asked for that caused no read."""
        return 1 - self.read / self.asked if self.asked else 0.0


class HotRows:
    """The last ``capacity_rows`` or so rows read, kept as stored; gathers like the table itself, value for value.

    Each call asks for every row once, however often it occurs. A row may lie in any of the ``WAYS`` places of its set, where
    the one used longest ago gives way. All of it is array work; one call at a time, others wait.
    """

    def __init__(self, table: EngramTable, capacity_rows: int) -> None:
        if isinstance(capacity_rows, bool) or not isinstance(capacity_rows, int | np.integer) or capacity_rows < 1:
            raise InputError(f"capacity_rows must be a positive whole number, got {capacity_rows!r}")
        self.table = table
        self.ways = min(WAYS, int(capacity_rows))
        self.sets = min(int(capacity_rows), table.rows) // self.ways or 1
        self.in_memory = table.in_memory
        self._stored = np.empty((self.capacity_rows, table.row_bytes), np.uint8)
        self._ids = np.full((self.sets, self.ways), NOTHING, np.int64)
        self._used = np.zeros((self.sets, self.ways), np.int64)  # number of the call that used a place last
        self._calls = 0
        self._lock = threading.Lock()
        self.counts = HotRowCounts()

    @property
    def capacity_rows(self) -> int:
        """Rows that can be held: at most what was asked for."""
        return self.sets * self.ways

    @property
    def nbytes(self) -> int:
        """Bytes the cache takes, with its lists of what lies where."""
        return self._stored.nbytes + self._ids.nbytes + self._used.nbytes

    @property
    def rows(self) -> int:
        return self.table.rows

    @property
    def width(self) -> int:
        return self.table.width

    @property
    def dtype(self) -> str:
        return self.table.dtype

    @property
    def value_dtype(self) -> np.dtype:
        return self.table.value_dtype

    @property
    def row_bytes(self) -> int:
        return self.table.row_bytes

    def gather(self, row_ids: Any, out: np.ndarray | None = None) -> np.ndarray:
        """As ``EngramTable.gather``, with its errors; after one the cache is as before."""
        ids, shape = self.table.check_ids(row_ids)
        out = self.table.room(out, shape)
        distinct, where = np.unique(ids, return_inverse=True)
        with self._lock:
            stored = self._fetch(distinct, len(ids))
        np.take(self.table.decode(stored), where.reshape(-1), axis=0, out=out.reshape(len(ids), self.width), mode="clip")
        return out

    def all_values(self) -> np.ndarray:
        """As ``EngramTable.all_values``: past the cache, which keeps its rows."""
        return self.table.all_values()

    def clear(self) -> None:
        """Forget all rows and counts."""
        with self._lock:
            self._ids.fill(NOTHING)
            self._used.fill(0)
            self._calls, self.counts = 0, HotRowCounts()

    def _fetch(self, ids: np.ndarray, asked: int) -> np.ndarray:
        """Stored rows [n, row_bytes] of different ids [n], ascending: from the cache, the rest from the table."""
        sets = ids % self.sets
        at = self._ids[sets] == ids[:, None]  # [n, ways]
        hit = at.any(1)
        place = sets * self.ways + at.argmax(1)
        missing = ids[~hit]
        read = self.table.gather_raw(missing)  # first, as it may fail
        stored = np.empty((len(ids), self.row_bytes), np.uint8)
        stored[hit] = self._stored[place[hit]]
        stored[~hit] = read
        self._calls += 1
        self._used.reshape(-1)[place[hit]] = self._calls
        self._keep(missing, sets[~hit], read)
        c = self.counts
        self.counts = HotRowCounts(
            asked=c.asked + asked,
            distinct=c.distinct + len(ids),
            read=c.read + len(missing),
            read_bytes=c.read_bytes + self.table.pages(missing) * PAGE,
            plain_bytes=c.plain_bytes + self.table.pages(ids) * PAGE,
        )
        return stored

    def _keep(self, ids: np.ndarray, sets: np.ndarray, read: np.ndarray) -> None:
        """Put rows where the places used longest ago are: the k-th of a set into its k-th oldest, those too many nowhere."""
        order = np.argsort(sets, kind="stable")
        ids, sets = ids[order], sets[order]
        new_set = np.ones(len(sets), bool)
        new_set[1:] = sets[1:] != sets[:-1]
        nth = np.arange(len(sets)) - np.maximum.accumulate(np.where(new_set, np.arange(len(sets)), 0))
        fits = nth < self.ways
        ids, sets, nth, order = ids[fits], sets[fits], nth[fits], order[fits]
        oldest_first = np.argsort(self._used[sets], axis=1, kind="stable")
        place = sets * self.ways + oldest_first[np.arange(len(sets)), nth]
        self._ids.reshape(-1)[place] = ids
        self._used.reshape(-1)[place] = self._calls
        self._stored[place] = read[order]
