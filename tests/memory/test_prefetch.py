"""Engram rows fetched ahead: same values as fetched on the spot, one clear error when they cannot be read, no thread left."""

import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.slow_reference import CONFIG, ENGRAM, random_ids, random_model
from workbench.errors import InputError, WorkbenchError
from workbench.memory import prefetch
from workbench.memory.prefetch import POLICIES, Lookup, RowFetcher
from workbench.memory.rows import TableSource

WITH_ENGRAM = replace(CONFIG, engram=ENGRAM)
AHEAD = ("prefetch", "serial")


class Table:
    """Rows in memory with the interface of ``wb.EngramTable``; ``before`` is called by every read that is one."""

    def __init__(self, rows: int = 97, width: int = 5, dtype: type = np.float16, *, in_memory: bool = True) -> None:
        self.rows, self.width, self.in_memory = rows, width, in_memory
        self.values = np.random.default_rng(0).normal(size=(rows, width)).astype(dtype)
        self.before = lambda row_ids: None

    def gather(self, row_ids, out=None):
        if len(row_ids):
            self.before(row_ids)
        values = self.values[row_ids]
        if out is None:
            return values
        out[...] = values
        return out

    def wanted(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.values[rows.numpy()]).flatten(-2)


def workers() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("engram-rows")}


def draw(tokens: int = 3, per_token: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 97, (1, tokens, per_token), generator=torch.Generator().manual_seed(seed))


def gone(condition, timeout_s: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return not condition()


@pytest.fixture
def table():
    return Table()


@pytest.fixture
def fetcher():
    before = workers()
    made = RowFetcher()
    yield made
    made.close()
    assert gone(lambda: workers() - before), "a worker was left behind"


# -- values and times --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_lookup_brings_rows_values_and_times_in_order(fetcher, policy, in_memory):
    table, rows = Table(in_memory=in_memory), draw()
    with fetcher.start(4, lambda: rows, TableSource(table), policy) as lookup:
        assert lookup.layer == 4 and torch.equal(lookup.rows, rows) and torch.equal(lookup.memory, table.wanted(rows))
        times = ("ids_from_s", "asked_s", "started_s", "hashed_s", "gather_from_s", "gathered_s", "wait_to_s")
        found = [getattr(lookup, name) for name in times]
        assert found == sorted(found) and lookup.asked_s <= lookup.wait_from_s <= lookup.wait_to_s
        assert lookup.looked_up == (policy != "resident") and lookup.copied() is None


def test_prefetching_works_before_the_result_is_asked_for_and_serial_does_not(fetcher, table):
    gathered, here, source = threading.Event(), [], TableSource(table)

    def note(_rows) -> None:
        here.append(threading.current_thread())
        gathered.set()

    table.before = note
    with fetcher.start(0, draw, source, "prefetch") as ahead:
        assert gathered.wait(30) and here[0] is not threading.main_thread()
    assert ahead.started_s <= ahead.wait_to_s
    gathered.clear()
    late = fetcher.start(0, draw, source, "serial")
    assert not gathered.wait(0.05)
    with late as lookup:
        assert lookup.wait_from_s <= lookup.started_s <= lookup.wait_to_s and here[-1] is threading.main_thread()


def test_lookups_are_served_in_the_order_asked_by_one_worker_through_fewer_buffers(table):
    fetcher, order = RowFetcher(depth=2), []
    table.before = lambda row_ids: order.append((int(row_ids[0]), threading.current_thread()))
    all_rows = [torch.full((1, 2, 3), n) for n in range(7)]
    fetches = [fetcher.start(n, lambda rows=rows: rows, TableSource(table), "prefetch") for n, rows in enumerate(all_rows)]
    for rows, fetch in zip(all_rows, fetches, strict=True):
        with fetch as lookup:
            assert torch.equal(lookup.memory, table.wanted(rows))
    assert [first for first, _ in order] == list(range(7)) and len({thread for _, thread in order}) == 1
    fetcher.close()


def test_a_buffer_is_not_written_again_before_its_reader_is_done(table):
    """With both buffers in use the worker waits, and goes on as soon as one comes back."""
    fetcher, read = RowFetcher(depth=2), threading.Semaphore(0)
    table.before = lambda row_ids: read.release()
    rows = [draw(seed=n) for n in range(4)]
    fetches = [fetcher.start(n, lambda r=r: r, TableSource(table), "prefetch") for n, r in enumerate(rows)]
    held = [fetch.result() for fetch in fetches[:2]]
    assert read.acquire(timeout=30) and read.acquire(timeout=30)
    assert gone(lambda: fetches[2].state != "waits for a buffer") and not read.acquire(timeout=0.1)
    for lookup, wanted in zip(held, rows, strict=False):
        assert torch.equal(lookup.memory, table.wanted(wanted))
    fetches[0].release()
    assert read.acquire(timeout=30) and not read.acquire(timeout=0.05)
    assert torch.equal(held[1].memory, table.wanted(rows[1]))
    assert held[0].memory.data_ptr() == fetches[2].result().memory.data_ptr() != held[1].memory.data_ptr()
    fetches[1].release()
    assert torch.equal(fetches[3].result().memory, table.wanted(rows[3]))
    for fetch in fetches:
        fetch.release()
    fetcher.close()


def test_a_lookup_larger_than_its_buffer_grows_it_and_small_ones_use_it_again(table):
    fetcher = RowFetcher(depth=1, buffer_bytes=64)
    sizes, places = (2, 5000, 3, 20000, 7), []
    for n, tokens in enumerate(sizes):
        rows = draw(tokens, seed=n)
        with fetcher.start(0, lambda rows=rows: rows, TableSource(table), "prefetch") as lookup:
            assert torch.equal(lookup.memory, table.wanted(rows))
            places.append(lookup.memory.data_ptr())
    assert places[1] == places[2] and places[3] == places[4] and places[1] != places[3]
    fetcher.close()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_of_any_width_and_format_share_the_ring(fetcher, dtype):
    for width in (1, 3, 64):
        table, rows = Table(width=width, dtype=dtype), draw(11, 3)
        with fetcher.start(0, lambda rows=rows: rows, TableSource(table), "prefetch") as lookup:
            assert lookup.memory.dtype == torch.from_numpy(table.values).dtype and torch.equal(
                lookup.memory, table.wanted(rows)
            )


def test_a_released_fetch_gives_no_rows_and_frees_the_ring_whenever_that_happens(table):
    fetcher, may_read = RowFetcher(depth=1), threading.Event()
    table.before = lambda row_ids: may_read.wait(30)
    source = TableSource(table)
    running, queued = (fetcher.start(n, draw, source, "prefetch") for n in range(2))
    assert gone(lambda: running.state != "reads")
    running.release()
    queued.release()
    queued.release()
    may_read.set()
    with fetcher.start(2, draw, source, "prefetch") as lookup:  # the only buffer has come back
        assert torch.equal(lookup.memory, table.wanted(draw()))
    with pytest.raises(WorkbenchError, match="rows of layer 1 were given back"):
        queued.result()
    fetcher.close()


# -- what goes wrong ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", AHEAD)
@pytest.mark.parametrize(
    ("error", "cause"), [(OSError("disk\ngone"), "disk gone"), (InputError("row 98"), "row 98"), (KeyError(), "KeyError")]
)
def test_a_failed_read_names_layer_and_cause_and_the_next_one_works(fetcher, table, policy, error, cause):
    def fail(_rows) -> None:
        raise error

    table.before, source = fail, TableSource(table)
    fetch = fetcher.start(3, draw, source, policy)
    with pytest.raises(WorkbenchError) as failed:
        fetch.result()
    assert str(failed.value) == f"Engram rows of layer 3 could not be fetched: {cause}"
    table.before = lambda row_ids: None
    for _ in range(prefetch.DEPTH + 1):  # no buffer was lost
        with fetcher.start(3, draw, source, policy) as lookup:
            assert torch.equal(lookup.memory, table.wanted(draw()))


@pytest.mark.parametrize("policy", AHEAD)
def test_a_read_that_hangs_is_given_up_and_the_fetcher_works_again_at_once(policy):
    before, table, may_end = workers(), Table(in_memory=False), threading.Event()
    fetcher, source = RowFetcher(timeout_s=0.2), TableSource(table)
    table.before = lambda row_ids: may_end.wait(60)
    hung, behind = fetcher.start(1, draw, source, policy), fetcher.start(3, draw, source, "prefetch")
    with pytest.raises(WorkbenchError, match=r"^Engram rows of layer 1 could not be fetched: (reading|an earlier)"):
        hung.result()
    behind.release()
    table.before = lambda row_ids: None
    with fetcher.start(1, draw, source, policy) as lookup:  # while the first read still hangs
        assert torch.equal(lookup.memory, table.wanted(draw()))
    may_end.set()
    fetcher.close()
    assert gone(lambda: workers() - before)


def test_a_slow_read_within_the_limit_is_waited_for(table):
    fetcher = RowFetcher(timeout_s=30)
    table.before = lambda row_ids: time.sleep(0.1)
    with fetcher.start(0, draw, TableSource(table), "prefetch") as lookup:
        assert lookup.wait_to_s - lookup.wait_from_s > 0.05 and torch.equal(lookup.memory, table.wanted(draw()))
    fetcher.close()


@pytest.mark.parametrize("policy", AHEAD)
def test_buffers_that_nobody_gives_back_are_an_error_and_no_hang(table, policy):
    fetcher, source = RowFetcher(depth=1, timeout_s=0.2), TableSource(table)
    kept = fetcher.start(0, draw, source, "prefetch")
    kept.result()
    with pytest.raises(WorkbenchError, match="layer 1 could not be fetched: all 1 staging buffers have been in use for 0.2 s"):
        fetcher.start(1, draw, source, policy).result()
    kept.release()
    fetcher.close()


def test_an_interrupt_while_a_layer_waits_ends_the_call_and_leaves_no_thread():
    before, model, ids = workers(), random_model(WITH_ENGRAM), random_ids(CONFIG, 1, 19)
    with torch.inference_mode():
        wanted = model(ids)
    engram_table, may_end = model.blocks[1].engram.table, threading.Event()
    healthy = engram_table.gather
    main = threading.main_thread().ident

    def hang(rows, out=None):
        threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
        may_end.wait(60)
        return healthy(rows, out)

    engram_table.gather = hang
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), torch.inference_mode():
        model(ids)
    assert time.monotonic() - began < 30
    engram_table.gather = healthy
    with torch.inference_mode():
        assert torch.equal(model(ids), wanted)  # while the interrupted read still hangs
    may_end.set()
    model.fetcher.retire()
    assert gone(lambda: workers() - before)


def test_closing_lets_the_read_under_way_finish_drops_the_rest_and_ends_the_thread(table):
    before, fetcher, begun, may_end = workers(), RowFetcher(), threading.Event(), threading.Event()

    def slow(_rows) -> None:
        begun.set()
        may_end.wait(30)

    table.before, source = slow, TableSource(table)
    fetch, dropped = (fetcher.start(n, draw, source, "prefetch") for n in range(2))
    mine = workers() - before
    begun.wait(30)
    threading.Timer(0.05, may_end.set).start()
    fetcher.close()
    assert len(mine) == 1 and not any(thread.is_alive() for thread in mine)
    assert torch.equal(fetch.result().memory, table.wanted(draw()))
    with pytest.raises(WorkbenchError, match="layer 1 could not be fetched: the fetcher was closed"):
        dropped.result()
    fetcher.close()  # twice does no harm
    with fetcher.start(0, draw, source, "prefetch") as lookup:  # and it can begin again
        assert isinstance(lookup, Lookup)
    fetcher.close()


def test_closing_while_another_thread_waits_for_a_buffer_wakes_it(table):
    fetcher, source, said = RowFetcher(depth=1), TableSource(table), []
    kept = fetcher.start(0, draw, source, "prefetch")
    kept.result()

    def wait() -> None:
        try:
            fetcher.start(1, draw, source, "prefetch").result()
        except WorkbenchError as error:
            said.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    fetcher.close()
    thread.join(30)
    assert not thread.is_alive() and "the fetcher was closed" in said[0]


def test_an_idle_worker_ends_and_another_is_made_when_there_is_work(monkeypatch, table):
    monkeypatch.setattr(prefetch, "IDLE_S", 0.05)
    before, fetcher, source = workers(), RowFetcher(), TableSource(table)
    for _ in range(3):
        with fetcher.start(0, draw, source, "prefetch") as lookup:
            assert torch.equal(lookup.memory, table.wanted(draw()))
        assert gone(lambda: workers() - before)


@pytest.mark.parametrize("way", ["idle", "retired", "twice"])
def test_closing_waits_for_a_worker_that_has_left_its_queue_and_not_yet_ended(monkeypatch, table, way):
    serve, left = prefetch._serve, threading.Semaphore(0)

    def and_linger(crew) -> None:
        serve(crew)
        left.release()
        time.sleep(0.2)

    monkeypatch.setattr(prefetch, "IDLE_S", 0.0 if way == "idle" else 30.0)
    monkeypatch.setattr(prefetch, "_serve", and_linger)
    before, fetcher, source = workers(), RowFetcher(), TableSource(table)
    for _ in range(2):  # with nothing to wait for, the second worker is made while the first lingers
        with fetcher.start(0, draw, source, "prefetch") as lookup:
            assert torch.equal(lookup.memory, table.wanted(draw()))
        assert way != "idle" or left.acquire(timeout=30)
    if way == "twice":  # a call that failed lets its worker go and does not wait; the end of its run does
        fetcher.retire()
    fetcher.close()
    assert workers() <= before


def test_serial_and_resident_lookups_of_a_table_in_memory_need_no_worker(fetcher, table):
    before = workers()
    for policy in ("serial", "resident"):
        with fetcher.start(0, draw, TableSource(table), policy):
            assert workers() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0}, "depth must be a positive whole number, got 0"),
        ({"buffer_bytes": 1.5}, "buffer_bytes must be a positive whole number, got 1.5"),
        ({"timeout_s": 0}, "timeout_s must be a positive number of seconds, got 0"),
        ({"timeout_s": float("inf")}, "got inf"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        RowFetcher(**settings)


def test_an_unknown_policy_and_a_table_without_rows_are_refused(fetcher, table):
    with pytest.raises(InputError, match="'soon' is unknown; choose one of"):
        fetcher.start(0, draw, TableSource(table), "soon")
    with pytest.raises(InputError, match=r"a table needs rows, width and gather.*, list lacks \['rows', 'width', 'gather'\]"):
        TableSource([1, 2])


def test_a_table_too_large_for_the_device_is_not_made_resident(monkeypatch, table):
    monkeypatch.setattr("workbench.memory.rows.available_bytes", lambda device: 2.0 * table.values.nbytes - 1)
    with pytest.raises(InputError, match="does not fit on cpu; use prefetch='prefetch' or 'serial'"):
        TableSource(table).resident(torch.device("cpu"))
