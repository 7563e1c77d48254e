"""The stall told beforehand: its formula against a slow clock, and a small grid in which it is told rightly."""

import json
import random
import subprocess
import threading

import numpy as np
import pytest

from benchmarks import overlap as bench
from tests.memory.test_overlap import SlowTable
from workbench.errors import InputError, WorkbenchError
from workbench.memory import predict
from workbench.memory.overlap import RandomTable
from workbench.memory.predict import CONTENTIONS, GridPoint, OverlapGrid, loaded, overlap_grid, predict_stall


def ticking_stall(window, lookup, begin, wake, compute_slowdown, lookup_slowdown, tick=1e-5) -> float:
    """The same by a clock that ticks: what has each side done after every tick, at the speed it has then?"""
    computed = fetched = now = 0.0
    arrived = None
    while fetched < lookup - 1e-12:
        fetching = now >= begin
        computing = arrived is None
        if computing:
            computed += tick / compute_slowdown
        if fetching:
            fetched += tick / (lookup_slowdown if computing else 1.0)
        now += tick
        if computing and computed >= window - 1e-12:
            arrived = now
    return 0.0 if arrived is None else now - arrived + wake


@pytest.mark.parametrize("seed", range(60))
def test_the_prediction_is_what_a_ticking_clock_shows(seed):
    draw = random.Random(seed)
    window, lookup = draw.uniform(0.001, 0.03), draw.uniform(0.001, 0.06)
    begin, wake = draw.choice([0.0, draw.uniform(0, 0.004)]), draw.uniform(0, 0.001)
    compute, fetch = draw.choice([(1.0, 1.0), (draw.uniform(1, 3), draw.uniform(1, 3))])
    predicted = predict_stall(window, lookup, begin_s=begin, wake_s=wake, compute_slowdown=compute, lookup_slowdown=fetch)
    slow = ticking_stall(window, lookup, begin, wake, compute, fetch)
    if min(predicted, slow) > 0:
        assert predicted == pytest.approx(slow, abs=1e-4)
    else:  # on the edge one of them may see the last row just in time
        assert max(predicted, slow) <= wake + 1e-4


def test_without_slowdowns_it_is_section_3s_stall():
    for window, lookup in ((0.01, 0.004), (0.01, 0.01), (0.01, 0.025)):
        assert predict_stall(window, lookup) == pytest.approx(max(0.0, lookup - window))


@pytest.fixture(scope="module")
def grid() -> OverlapGrid:
    said: list[float] = []
    before = set(threading.enumerate())
    found = overlap_grid(rows=(7, 3), windows_ms=(150.0, 5.0), table=SlowTable(0.05), rounds=1, seed=1, progress=said.append)
    assert said == sorted(said) and said[-1] == 1.0 and set(threading.enumerate()) <= before
    return found


def test_a_grid_has_every_combination_once_in_order(grid):
    wanted = [(kind, rows, window) for kind in CONTENTIONS for rows in (3, 7) for window in (5.0, 150.0)]
    assert [(p.contention, p.rows, p.window_ms) for p in grid.points] == wanted
    assert all(len(point.rounds_ms) == 1 for point in grid.points)


def test_what_must_stall_is_predicted_and_measured_to_stall_and_the_rest_is_not_counted(grid):
    """Reads that take 50 ms of nobody's core, so that only gross delays of the machine can disturb this."""
    for point in grid.points:
        assert point.lookup_ms >= 50
        if point.window_ms == 5.0:
            assert point.counted and point.predicted_ms > 20 and point.measured_ms > 20
    assert {point.window_ms for point in grid.failing} >= {5.0} and grid.median_error < 0.5
    assert all(slowdown >= 1.0 for slowdown in grid.slowdowns)


def test_a_grid_tells_its_points_and_verdict_and_can_be_stored(grid):
    text = grid.summary()
    assert text.count("\n") == len(grid.points) + 1 and f"{len(grid.points)} points" in text
    record = json.loads(json.dumps(bench.plain_grid(grid), allow_nan=False))
    assert len(record["points"]) == 16 and record["median relative error"] == grid.median_error


def point(predicted: float, measured: float) -> GridPoint:
    return GridPoint(
        rows=1, window_ms=1.0, contention="none", lookup_ms=1.0, handoff_ms=0.0,
        predicted_ms=predicted, measured_ms=measured, rounds_ms=(measured,),
    )  # fmt: skip


def test_the_error_is_told_over_stalls_longer_than_a_millisecond():
    made = OverlapGrid(
        points=(point(0.0, 0.9), point(12.0, 10.0), point(3.0, 4.0), point(0.0, 2.0), point(1.5, 0.0)),
        table="", slowdowns=(1.0, 1.0), load_average=None, foreign_cores=None,
    )  # fmt: skip
    assert len(made.failing) == 3 and made.median_error == pytest.approx(0.25) and made.agreeing == 3
    assert np.isnan(point(1.0, 0.0).relative_error)


@pytest.mark.parametrize("kind", ["compute", "memory"])
def test_a_loading_process_works_while_the_block_runs_and_ends_with_it(monkeypatch, kind):
    made = []
    start = subprocess.Popen

    def note(*args, **settings):
        made.append(start(*args, **settings))
        return made[-1]

    monkeypatch.setattr(predict.subprocess, "Popen", note)
    with pytest.raises(RuntimeError, match="in the block"), loaded(kind):
        assert made[0].poll() is None
        raise RuntimeError("in the block")
    assert made[0].poll() is not None and len(made) == 1


def test_a_loading_process_that_does_not_start_is_told(monkeypatch):
    monkeypatch.setattr(predict, "LOADER", "raise SystemExit(3)")
    with pytest.raises(WorkbenchError, match=r"load a core \(compute\) ended with status 3"), loaded("compute"):
        pytest.fail("it must not run")


def test_a_stopped_grid_says_so():
    with pytest.raises(WorkbenchError, match="stopped"):
        overlap_grid(rows=(3,), windows_ms=(1.0,), table=RandomTable(97, 3), should_stop=lambda: True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": ()}, r"rows must be positive whole numbers, one at least, got \(\)"),
        ({"rows": (0,)}, r"got \(0,\)"),
        ({"windows_ms": ()}, "windows_ms must lie above 0"),
        ({"windows_ms": (-1.0,)}, "windows_ms must lie above 0"),
        ({"contentions": ("noise",)}, r"contentions must be some of \('none', 'compute', 'memory', 'real'\)"),
        ({"rounds": 0}, "rounds must be a positive whole number, got 0"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        overlap_grid(**settings)
