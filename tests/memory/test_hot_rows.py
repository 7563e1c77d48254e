"""A cache of hot rows: the table's own values, never more rows than it may hold, fewer bytes read where rows come again."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.errors import InputError, WorkbenchError
from workbench.live import encode
from workbench.memory.hot_rows import HotRows
from workbench.memory.table import EngramTable
from workbench.needle import sample_text

ROWS = 5003


@pytest.fixture(params=["fp16", "bf16", "fp8"])
def table(request, tmp_path):
    with EngramTable.create(tmp_path / "t", ROWS, 48, request.param) as made:
        yield made


def zipf(count, seed=0, rows=ROWS):
    """Row numbers as n-grams of a text ask for them: a few all the time, most hardly ever."""
    popular = np.random.default_rng(7).permutation(rows)
    return popular[np.minimum(np.random.default_rng(seed).zipf(1.2, count), rows) - 1]


@pytest.mark.parametrize("capacity", [1, 3, 64, 777, 10 * ROWS])
def test_rows_come_as_from_the_table_and_no_more_are_held_than_allowed(table, capacity):
    hot, draw = HotRows(table, capacity), np.random.default_rng(capacity)
    assert hot.capacity_rows <= min(capacity, ROWS) and (hot.rows, hot.width) == (ROWS, 48)
    for call in range(12):
        ids = zipf(400, call).reshape(4, 100) if call % 2 else draw.integers(ROWS, size=(4, 100))
        np.testing.assert_array_equal(hot.gather(ids), table.gather(ids))
    held = hot._ids[hot._ids >= 0]
    assert len(held) <= hot.capacity_rows and len(np.unique(held)) == len(held)


def test_counts_add_up_and_fewer_bytes_are_read(table):
    hot, calls = HotRows(table, 500), [zipf(300, seed) for seed in range(20)]
    for ids in calls:
        hot.gather(ids)
    counts = hot.counts
    assert counts.asked == 20 * 300 and counts.distinct == sum(len(np.unique(ids)) for ids in calls)
    assert 0 < counts.read < counts.distinct and 0 < counts.hit_rate < counts.saved < 1
    assert counts.read_bytes < counts.plain_bytes
    hot.clear()
    assert hot.counts.asked == 0
    hot.gather(calls[0])
    assert hot.counts.read == hot.counts.distinct  # nothing was remembered


def test_a_row_used_again_outlives_rows_used_once(tmp_path):
    with EngramTable.create(tmp_path / "t", 64, 4) as table:
        hot = HotRows(table, 8)  # one set of eight places
        hot.gather(np.arange(8))
        for other in range(8, 14):
            hot.gather(np.array([3]))
            hot.gather(np.array([other]))
        read = hot.counts.read
        hot.gather(np.array([3]))
        assert hot.counts.read == read


def test_a_failing_read_leaves_the_cache_as_it_was(table, monkeypatch):
    hot = HotRows(table, 100)
    hot.gather(np.arange(50))
    before, ids = hot.counts, hot._ids.copy()

    def broken(*_):
        raise WorkbenchError("the disk is gone")

    with monkeypatch.context() as m:
        m.setattr(EngramTable, "gather_raw", broken)
        with pytest.raises(WorkbenchError, match="the disk is gone"):
            hot.gather(np.arange(40, 90))
    assert hot.counts == before and np.array_equal(hot._ids, ids)
    np.testing.assert_array_equal(hot.gather(np.arange(40, 90)), table.gather(np.arange(40, 90)))
    with pytest.raises(InputError, match="must lie in"):
        hot.gather(np.array([ROWS]))


def test_threads_get_their_own_rows(table):
    hot, wrong = HotRows(table, 200), []

    def work(seed):
        for call in range(10):
            ids = zipf(200, 100 * seed + call)
            if not np.array_equal(hot.gather(ids), table.gather(ids)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and hot.counts.asked == 4 * 10 * 200


@pytest.mark.parametrize("capacity", [0, -3, 2.5, "many", None, True])
def test_a_capacity_that_is_none_is_refused(table, capacity):
    with pytest.raises(InputError, match="capacity_rows must be a positive whole number"):
        HotRows(table, capacity)


def test_real_text_asks_for_the_same_rows_again(tmp_path):
    """Held-out text through a shipped model's own hash, rows of V4.1's size: a cache of a quarter of them spares reading."""
    model = wb.load("tiny-v4-engram", device="cpu")
    module = model.blocks[1].engram
    ids = model.canonical_ids(torch.tensor([encode(model, sample_text())[:20_000]]))
    with EngramTable.create(tmp_path / "t", module.hash.rows, 256, "fp8", fill="zero") as table:
        hot, lookback = HotRows(table, module.hash.rows // 4), ids[:, :0]
        for piece in ids.split(512, dim=1):
            hot.gather(module.hash(piece, lookback, 0).numpy())
            lookback = piece[:, -2:]
    assert hot.counts.saved > 0.5 and hot.counts.read_bytes < 0.8 * hot.counts.plain_bytes


class SlowCache:
    """One set after another, one row after another: the rows read are all that it knows."""

    def __init__(self, sets: int, ways: int) -> None:
        self.sets, self.ways, self.read = [OrderedDict() for _ in range(sets)], ways, 0

    def ask(self, ids: np.ndarray) -> None:
        distinct = np.unique(ids).tolist()
        missing = [i for i in distinct if i not in self.sets[i % len(self.sets)]]
        for i in distinct:
            if i not in missing:
                self.sets[i % len(self.sets)].move_to_end(i)
        self.read += len(missing)
        for place, rows in enumerate(self.sets):
            fresh = [i for i in missing if i % len(self.sets) == place][: self.ways]
            while len(rows) + len(fresh) > self.ways:
                rows.popitem(last=False)
            rows.update(dict.fromkeys(fresh))


@pytest.mark.parametrize("capacity", [8, 40, 333, 1000])
def test_it_reads_what_a_slow_cache_of_the_same_shape_reads(tmp_path, capacity):
    rng = np.random.default_rng(1)
    with EngramTable.create(tmp_path / "plain", 5003, 8, fill="zero") as plain:
        hot = HotRows(plain, capacity)
        slow = SlowCache(hot.sets, hot.ways)
        for n in [16, 700, 48, 1, 2000, 160] * 5:
            ids = rng.zipf(1.2, n) * 7919 % 5003
            hot.gather(ids)
            slow.ask(ids)
            # Of rows used in the same call any may go first, so the counts may drift apart a little
            assert abs(hot.counts.read - slow.read) <= 0.03 * slow.read
    assert hot.counts.read < hot.counts.distinct
