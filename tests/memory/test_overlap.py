"""The four runs of an experiment: what each does, whom it names, and that its numbers are those of its timelines."""

import importlib.util
import json
import statistics
import threading
import time

import numpy as np
import pytest

import workbench as wb
from benchmarks import overlap as bench
from workbench.errors import InputError, WorkbenchError
from workbench.memory.executors import EXECUTORS, NAMES
from workbench.memory.overlap import RUNS, OverlapResult, RandomTable, overlap_experiment
from workbench.trace import Timeline

SMALL = {"rows_per_lookup": 64, "window_ms": 2.0, "rounds": 3}


class SlowTable(RandomTable):
    """Every read takes ``seconds`` at least, and no core."""

    in_memory = False

    def __init__(self, seconds: float) -> None:
        super().__init__(rows=97, width=3)
        self.seconds = seconds

    def gather(self, row_ids, out=None):
        if len(row_ids):
            time.sleep(self.seconds)
        return super().gather(row_ids, out)


def spans_of(timeline: Timeline, lane: str) -> list:
    return [span for span in timeline.spans if span.lane == lane]


def total_ms(timeline: Timeline) -> float:
    return 1e3 * max(span.end_s for span in timeline.spans)


@pytest.fixture(scope="module", params=["emulated", "cpu"])
def found(request) -> OverlapResult:
    # Windows long enough for a worker to be woken within the first, even on a busy machine.
    return wb.overlap_experiment(request.param, table=RandomTable(997, 5), layers=(1, 3), **SMALL | {"window_ms": 40.0})


def test_every_timeline_names_its_run_executor_and_origin(found):
    assert tuple(found.timelines) == RUNS == tuple(found.totals_ms)
    for name, timeline in found.timelines.items():
        assert timeline.origin == "measured" and timeline.device.startswith("CPU")
        assert timeline.note.startswith(f"{name}; executor {NAMES[found.executor]}; windows of 40 ms before layer(s) 1, 3")
        assert all(span.origin == "measured" for span in timeline.spans)
    assert "997 rows of 5 values" in found.timelines["serial"].note and NAMES[found.executor] in found.summary()


def test_each_run_does_its_part_and_no_other(found):
    lanes = {name: {span.lane for span in timeline.spans} for name, timeline in found.timelines.items()}
    assert lanes["compute-only"] == {"compute"} and lanes["lookup-only"] == {"ids", "lookup"}
    assert lanes["serial"] == {"ids", "compute", "lookup", "stall"}
    for name, timeline in found.timelines.items():
        blocks = [span.name for span in spans_of(timeline, "compute")]
        assert sorted(blocks) == {"compute-only": ["layer 0", "layer 1", "layer 2"], "lookup-only": []}.get(
            name, [f"layer {n}" for n in range(4)]
        )


def test_prefetched_lookups_begin_before_the_first_block_ends_and_serial_ones_at_their_layer(found):
    for name in ("serial", "prefetched"):
        by_name = {span.name: span for span in found.timelines[name].spans}
        for layer in (1, 3):
            hashed, gathered = by_name[f"layer {layer} hash"], by_name[f"layer {layer} gather"]
            assert hashed.after == ("token ids",) and gathered.after == (hashed.name,)
            assert by_name[f"layer {layer}"].after == (gathered.name,)
            assert gathered.end_s <= by_name[f"layer {layer}"].start_s  # no row is used before it is there
            if name == "serial":
                before, stall = by_name[f"layer {layer - 1}"], by_name[f"layer {layer} waits"]
                assert before.end_s <= stall.start_s <= hashed.start_s and gathered.end_s <= stall.end_s
        if name == "prefetched" and found.executor == "emulated":  # on a full CPU the worker may have to wait for a core
            assert by_name["layer 1 hash"].start_s < by_name["layer 0"].end_s


def test_the_numbers_are_those_of_the_timelines_and_rounds(found):
    for name, totals in found.totals_ms.items():
        assert len(totals) == SMALL["rounds"]
        assert found.median_ms[name] == statistics.median(totals) and found.p10_ms[name] == np.quantile(totals, 0.1)
        assert total_ms(found.timelines[name]) <= found.median_ms[name] + 1e-6
    prefetched = found.timelines["prefetched"]
    assert found.exposed_ms == pytest.approx(1e3 * prefetched.stall_s)
    assert found.hidden_fraction == pytest.approx(prefetched.hidden_fraction)
    m = found.median_ms
    wanted = (m["serial"] - m["prefetched"]) / min(m["compute-only"], m["lookup-only"])
    assert found.saved_fraction == pytest.approx(wanted)


def test_an_emulated_window_hides_a_shorter_lookup():
    """A loose bound with one more try, since the machine may be doing anything; ``workbench bench overlap`` measures it."""
    for _ in range(2):
        found = overlap_experiment("emulated", table=SlowTable(0.05), window_ms=120.0, rows_per_lookup=5, rounds=3)
        m = found.median_ms
        assert m["compute-only"] >= 120 and m["lookup-only"] >= 50 and m["serial"] >= 170
        if m["prefetched"] < 0.9 * m["serial"] and found.hidden_fraction > 0.9:
            return
    pytest.fail(found.summary())


def test_a_lookup_longer_than_its_window_is_exposed():
    found = overlap_experiment("emulated", table=SlowTable(0.3), window_ms=10.0, rows_per_lookup=5, rounds=1)
    assert found.exposed_ms > 100 and found.hidden_fraction < 0.7
    stall = spans_of(found.timelines["prefetched"], "stall")[0]
    assert stall.name == "layer 1 waits" and stall.after == ("layer 1 gather",)


def test_rows_that_come_out_wrong_are_told():
    class Wrong(RandomTable):
        def gather(self, row_ids, out=None):
            return super().gather(row_ids if out is None else (row_ids + 1) % self.rows, out)

    with pytest.raises(WorkbenchError, match="came out of the staging buffer with other values than the table's"):
        overlap_experiment("emulated", table=Wrong(97, 4), **SMALL)


def test_a_failing_table_gives_one_clear_error_and_leaves_no_thread():
    class Gone(RandomTable):
        def gather(self, row_ids, out=None):
            if out is not None:
                raise OSError("disk gone")
            return super().gather(row_ids)

    before = set(threading.enumerate())
    with pytest.raises(WorkbenchError, match="^Engram rows of layer 1 could not be fetched: disk gone$"):
        overlap_experiment("emulated", table=Gone(97, 4), **SMALL)
    assert set(threading.enumerate()) <= before


def test_progress_rises_to_one_and_a_stopped_experiment_says_so():
    said: list[float] = []
    before = set(threading.enumerate())
    overlap_experiment("emulated", table=RandomTable(97, 4), **SMALL, progress=said.append)
    assert said == sorted(said) and len(said) == 4 * (SMALL["rounds"] + 2) and said[-1] == 1.0
    with pytest.raises(WorkbenchError, match="the experiment was stopped"):
        overlap_experiment("emulated", table=RandomTable(97, 4), **SMALL, should_stop=lambda: True)
    assert set(threading.enumerate()) <= before


def test_the_same_seed_draws_the_same_rows():
    class Noted(RandomTable):
        def __init__(self) -> None:
            super().__init__(97, 4)
            self.seen: list[list[int]] = []

        def gather(self, row_ids, out=None):
            if out is not None:
                self.seen.append(row_ids.tolist())
            return super().gather(row_ids, out)

    tables = [Noted() for _ in range(3)]
    for table, seed in zip(tables, (1, 1, 2), strict=True):
        overlap_experiment("emulated", table=table, **SMALL, seed=seed)
    assert tables[0].seen == tables[1].seen != tables[2].seen
    assert len({tuple(rows) for rows in tables[0].seen}) == len(tables[0].seen)  # rows no run has read before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"executor": "gpu"}, r"executor must be one of \('modelled', 'emulated', 'cpu', 'cuda'\), got 'gpu'"),
        ({"rows_per_lookup": 0}, "rows_per_lookup must be a positive whole number, got 0"),
        ({"rounds": 1.0}, "rounds must be a positive whole number, got 1.0"),
        ({"window_ms": 0}, "window_ms must lie above 0 and be at most 10000, got 0"),
        ({"window_ms": float("nan")}, "got nan"),
        ({"layers": ()}, r"layers must be numbers from 1 to 1000, one at least, got \(\)"),
        ({"layers": (0,)}, r"got \(0,\)"),
        ({"layers": 1}, "got 1"),
        ({"table": object()}, r"object lacks \['rows', 'width', 'gather'\]"),
        ({"executor": "modelled", "table": RandomTable(7, 2)}, "executor 'modelled' reads no table"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        overlap_experiment(**settings)


@pytest.mark.skipif(importlib.util.find_spec("workbench.schedule") is None, reason="the virtual clock is not there")
@pytest.mark.parametrize(("rows", "exposed"), [(100_000, 1.0), (200_000, 12.0)])
def test_the_modelled_run_is_the_closed_form_and_says_that_nothing_ran(rows, exposed):
    found = overlap_experiment("modelled", rows_per_lookup=rows, window_ms=10.0)
    lookup = rows * 110e-6  # ms
    assert found.median_ms == pytest.approx(
        {"compute-only": 10, "lookup-only": lookup, "serial": 10 + lookup, "prefetched": max(10, lookup)}
    )
    assert found.exposed_ms == pytest.approx(exposed) and found.saved_fraction == pytest.approx(1.0)
    for timeline in found.timelines.values():
        assert timeline.origin == "modelled" and "nothing ran" in timeline.note and timeline.device == "modelled device"


def test_every_executor_has_a_name_for_charts_and_a_result_a_record(found):
    assert set(EXECUTORS) <= set(NAMES)
    record = json.loads(json.dumps(bench.plain(found), allow_nan=False))
    assert record["executor"] == found.executor and record["median ms"] == found.median_ms
