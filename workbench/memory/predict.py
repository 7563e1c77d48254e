"""How long will compute stand still? Predicted from small measurements, then run, on a grid of rows x window x contention.

Hiding a lookup behind a timed wait is easy; the point is to know beforehand when it fails. What is measured for the prediction
are lookups alone, windows alone, an empty hand-off, and how much two real loads slow each other down; none of these is a run
that is predicted. Both kinds are taken in turn, so that a machine with other work to do is the same for both.
(reference/engram-and-overlap.md, sections 3 and 5)
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import numpy as np
import torch

from workbench.errors import InputError, WorkbenchError
from workbench.memory.executors import EmulatedDevice, HostExecutor
from workbench.memory.overlap import MOST_WINDOW_MS, Lab, Load, Progress, Stop, go_on
from workbench.runtime import threads_for_run, use_threads

Contention = Literal["none", "compute", "memory", "real"]
CONTENTIONS: dict[Contention, str] = {
    "none": "timed windows, nothing else of ours runs",
    "compute": "timed windows, another process multiplies matrices",
    "memory": "timed windows, another process copies memory",
    "real": "the windows themselves are matrix products on the CPU",
}
WINDOWS_MS = (5.0, 10.0, 20.0)
LOOKUPS_MS = (3.0, 14.0, 40.0)  # what the default numbers of rows are chosen to take
SIZING_ROWS, SIZINGS = 24 * 1024, 9
TINY = 1  # row, whose lookup is all hand-off
COUNTED_MS = 1.0  # stalls longer than this count in the error
START_S = 30.0  # a loading process may take so long to begin
LOADER = """
import os, sys
import numpy as np
parent, kind = os.getppid(), sys.argv[1]
a = np.random.default_rng(0).random((256, 256) if kind == "compute" else (1 << 23,)).astype(np.float32)
b = np.empty_like(a)
print("ready", flush=True)
while os.getppid() == parent:
    for _ in range(20):
        np.matmul(a, a, out=b) if kind == "compute" else np.copyto(b, a)
"""


def predict_stall(
    window_s: float,
    lookup_s: float,
    *,
    begin_s: float = 0.0,
    wake_s: float = 0.0,
    compute_slowdown: float = 1.0,
    lookup_slowdown: float = 1.0,
) -> float:
    """Seconds that compute stands still at a layer ``window_s`` after its lookup was asked for.

    ``window_s`` and ``lookup_s`` are what each takes alone; while both run, each takes its slowdown times as long, and what is
    left of the lookup after the window goes on alone. ``begin_s`` passes before the worker begins, ``wake_s`` from the last
    row to compute going on. Without slowdowns it is section 3's stall = max(0, done - start).
    """
    window = window_s * compute_slowdown
    done = max(0.0, window - begin_s) / lookup_slowdown  # of the lookup, in seconds of it alone
    waits = begin_s - window if begin_s > window else 0.0
    left = waits + lookup_s - done
    return left + wake_s if left > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GridPoint:
    """One point: what was predicted from ``lookup_ms`` and the rest, and the median stall of the runs."""

    rows: int
    window_ms: float  # asked for
    contention: Contention
    lookup_ms: float  # alone, measured apart
    handoff_ms: float
    predicted_ms: float
    measured_ms: float
    rounds_ms: tuple[float, ...]  # the stall of every run

    @property
    def counted(self) -> bool:
        return self.measured_ms > COUNTED_MS

    @property
    def relative_error(self) -> float:
        """|predicted - measured| / measured; NaN where nothing stalled."""
        return abs(self.predicted_ms - self.measured_ms) / self.measured_ms if self.measured_ms else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapGrid:
    """All points of a grid. Overlap fails where a stall is longer than 1 ms; the error is told over those."""

    points: tuple[GridPoint, ...]
    table: str
    slowdowns: tuple[float, float]  # of compute and of the lookup, while both are real
    load_average: float | None
    foreign_cores: float | None

    @property
    def failing(self) -> tuple[GridPoint, ...]:
        return tuple(point for point in self.points if point.counted)

    @property
    def median_error(self) -> float:
        return median(point.relative_error for point in self.failing) if self.failing else float("nan")

    @property
    def agreeing(self) -> int:
        """Points for which prediction and measurement agree whether overlap fails."""
        return sum((point.predicted_ms > COUNTED_MS) == point.counted for point in self.points)

    def summary(self) -> str:
        """The table and the verdict, as text."""
        lines = ["contention     rows  window  lookup  predicted  measured   error"]
        for p in self.points:
            error = f"{p.relative_error:8.0%}" if p.counted else "        "
            times = f"{p.window_ms:8.1f}{p.lookup_ms:8.1f}{p.predicted_ms:11.2f}{p.measured_ms:10.2f}"
            lines.append(f"{p.contention:10}{p.rows:9,}{times}{error}")
        foreign = "unknown" if self.foreign_cores is None else f"{self.foreign_cores:.2f} cores"
        average = "unknown" if self.load_average is None else f"{self.load_average:.2f}"
        lines.append(
            f"{len(self.points)} points, times in ms; overlap fails at {len(self.failing)}; median relative error there "
            f"{self.median_error:.1%}; prediction right about failing at {self.agreeing} of {len(self.points)}; real compute "
            f"and lookup slow each other {self.slowdowns[0]:.2f} and {self.slowdowns[1]:.2f} times; load average {average}, "
            f"foreign load {foreign}"
        )
        return "\n".join(lines)


@dataclass(slots=True)
class Sample:
    """One round's small measurements under one contention, in seconds."""

    lookup_s: dict[int, list[float]]
    window_s: dict[float, float]
    begin_s: float
    wake_s: float
    compute_slowdown: float = 1.0
    lookup_slowdown: float = 1.0


def overlap_grid(
    *,
    rows: Sequence[int] | None = None,
    windows_ms: Sequence[float] = WINDOWS_MS,
    contentions: Sequence[Contention] = tuple(CONTENTIONS),
    table: Any = None,
    rounds: int = 11,
    seed: int = 0,
    progress: Progress | None = None,
    should_stop: Stop | None = None,
) -> OverlapGrid:
    """Predict and measure the stall of one Engram layer for every combination; 36 points by default.

    ``rows`` a lookup: by default as many as take about 3, 14 and 40 ms here. ``contentions``: see ``CONTENTIONS``.
    Raises InputError for settings that cannot be used; WorkbenchError when stopped or when a loading process does not start.
    """
    _check(rows, windows_ms, contentions, rounds)
    say, stopped = progress or (lambda share: None), should_stop or (lambda: False)
    use_threads(threads_for_run())
    draw = np.random.default_rng(seed)
    samples: dict[Contention, list[Sample]] = {kind: [] for kind in contentions}
    stalls: dict[tuple[Contention, int, float], list[float]] = {}
    lab = Lab(EmulatedDevice(), table, seed)
    try:
        with Load() as load:
            sizes = tuple(rows) if rows else _sizes(lab)
            for number, kind in enumerate(contentions):
                lab.executor = HostExecutor() if kind == "real" else EmulatedDevice()
                lab.executor.prepare()
                with loaded(kind):
                    for done in range(-1, rounds):  # the first warms up
                        go_on(stopped)
                        sample, found = _round(lab, kind, sizes, windows_ms, draw)
                        if done >= 0:
                            samples[kind].append(sample)
                            for (count, window), stall in found.items():
                                stalls.setdefault((kind, count, window), []).append(stall)
                        say((number + (done + 2) / (rounds + 1)) / len(contentions))
    finally:
        lab.close()
    order = [(kind, count, window) for kind in contentions for count in sorted(sizes) for window in sorted(windows_ms)]
    points = tuple(_point(key, samples[key[0]], stalls[key]) for key in order)
    real = samples.get("real", [])
    return OverlapGrid(
        points=points,
        table=lab.about,
        slowdowns=(median(s.compute_slowdown for s in real), median(s.lookup_slowdown for s in real)) if real else (1.0, 1.0),
        load_average=load.average,
        foreign_cores=load.foreign_cores,
    )


def _round(
    lab: Lab, kind: Contention, sizes: Sequence[int], windows_ms: Sequence[float], draw: np.random.Generator
) -> tuple[Sample, dict[tuple[int, float], float]]:
    """Small measurements and runs in a shuffled order: what each needs, and the stall of each run in seconds."""
    sample = Sample({}, {}, 0.0, 0.0)
    found: dict[tuple[int, float], float] = {}
    # As many lookups alone as runs that read so many rows, spread among them.
    work: list[tuple[str, int, float]] = [("lookup", count, 0.0) for count in sizes for _ in windows_ms]
    work += [("window", 0, window) for window in windows_ms] + [("hand-off", 0, 0.0)]
    work += [("beside", max(sizes), 0.0)] if kind == "real" else []
    work += [("run", count, window) for count in sizes for window in windows_ms]
    for place in draw.permutation(len(work)):
        what, count, window = work[place]
        if what == "lookup":
            sample.lookup_s.setdefault(count, []).append(lookup_alone(lab, count)[1])
        elif what == "hand-off":
            trips = [lookup_alone(lab, TINY) for _ in range(5)]
            sample.begin_s, sample.wake_s = (median(trip[side] for trip in trips) for side in (0, 2))
        elif what == "window":
            start, end = lab.executor.times(lab.executor.block(window / 1e3))
            sample.window_s[window] = end - start
        elif what == "beside":
            sample.compute_slowdown, sample.lookup_slowdown = beside(lab, count)
        else:
            found[count, window] = lab.run("prefetched", count, window / 1e3, (1,))[1].stall_s
    return sample, found


def lookup_alone(lab: Lab, rows: int) -> tuple[float, float, float]:
    """Seconds until the worker began, of hash and gather, and from the last row to the waiting thread going on."""
    work = lab.hash_rows(rows)
    with torch.inference_mode(), lab.fetcher.start(1, work, lab.source, "prefetch", lab.executor) as lookup:
        return lookup.started_s - lookup.asked_s, lookup.gathered_s - lookup.started_s, lookup.wait_to_s - lookup.gathered_s


def beside(lab: Lab, rows: int) -> tuple[float, float]:
    """How many times as long real compute and a lookup take beside each other as alone."""
    alone = lookup_alone(lab, rows)[1]
    start = time.perf_counter()
    lab.executor.multiply(products := 40)
    product_s = (time.perf_counter() - start) / products
    work, done = lab.hash_rows(rows), 0
    with torch.inference_mode():
        fetch = lab.fetcher.start(1, work, lab.source, "prefetch", lab.executor)
        start = time.perf_counter()
        while not fetch.ready:
            lab.executor.multiply(1)
            done += 1
        taken = time.perf_counter() - start
        with fetch as lookup:
            lookup_s = lookup.gathered_s - lookup.started_s
    return max(1.0, taken / (done * product_s)), max(1.0, lookup_s / alone)


def _point(key: tuple[Contention, int, float], samples: list[Sample], stalls: list[float]) -> GridPoint:
    kind, rows, window = key
    lookup, begin, wake = (
        median(values)
        for values in (
            [seconds for s in samples for seconds in s.lookup_s[rows]],
            [s.begin_s for s in samples],
            [s.wake_s for s in samples],
        )
    )
    predicted = predict_stall(
        median(s.window_s[window] for s in samples),
        lookup,
        begin_s=begin,
        wake_s=wake,
        compute_slowdown=median(s.compute_slowdown for s in samples),
        lookup_slowdown=median(s.lookup_slowdown for s in samples),
    )
    return GridPoint(
        rows=rows,
        window_ms=window,
        contention=kind,
        lookup_ms=1e3 * lookup,
        handoff_ms=1e3 * (begin + wake),
        predicted_ms=1e3 * predicted,
        measured_ms=1e3 * median(stalls),
        rounds_ms=tuple(1e3 * stall for stall in stalls),
    )


@contextmanager
def loaded(kind: Contention) -> Iterator[None]:
    """Another process keeps one core busy with real work while the block runs; it ends with the block, or with this process."""
    if kind not in ("compute", "memory"):
        yield
        return
    alone = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    process = subprocess.Popen(
        [sys.executable, "-c", LOADER, kind], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=os.environ | alone
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != b"ready":
            raise WorkbenchError(f"the process that should load a core ({kind}) ended with status {process.wait(START_S)}")
        yield
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def _sizes(lab: Lab) -> tuple[int, ...]:
    """Numbers of rows, multiples of 1,024, whose lookups take about ``LOOKUPS_MS`` here when nothing gets in between."""
    for _ in range(2):
        lookup_alone(lab, SIZING_ROWS)
    per_row = min(lookup_alone(lab, SIZING_ROWS)[1] for _ in range(SIZINGS)) / SIZING_ROWS  # not what a busy moment adds
    return tuple(1024 * max(1, round(ms / 1e3 / per_row / 1024)) for ms in LOOKUPS_MS)


def _check(rows: Sequence[int] | None, windows_ms: Sequence[float], contentions: Sequence[Contention], rounds: int) -> None:
    if rows is not None and (not rows or not all(isinstance(n, int) and n > 0 for n in rows)):
        raise InputError(f"rows must be positive whole numbers, one at least, got {rows!r}")
    if not windows_ms or not all(isinstance(w, int | float) and 0 < w <= MOST_WINDOW_MS for w in windows_ms):
        raise InputError(f"windows_ms must lie above 0 and be at most {MOST_WINDOW_MS:g}, got {windows_ms!r}")
    if not contentions or not set(contentions) <= set(CONTENTIONS):
        raise InputError(f"contentions must be some of {tuple(CONTENTIONS)}, got {contentions!r}")
    if not isinstance(rounds, int) or rounds < 1:
        raise InputError(f"rounds must be a positive whole number, got {rounds!r}")
