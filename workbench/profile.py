"""A profiler's trace by streams and threads: what ran on each, and how much of every copy lay under compute.

Made by `workbench.chrome_trace.load` from what torch.profiler exports for CPU or CUDA. Times are seconds since the first span.
Kernels, copies and memory sets of a stream are tracks of their own, and so is the work of each host thread: its operators and
runtime calls, or its annotations where it has none (an annotation goes on while its thread only waits).
(reference/engram-and-overlap.md, sections 4.4 and 4.6)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from workbench.errors import InputError
from workbench.intervals import Cover, length, shared, union

Kind = Literal["kernels", "copies", "memory sets", "thread"]
ON_DEVICE: dict[str, Kind] = {
    **dict.fromkeys(("kernel", "concurrent_kernel"), "kernels"),
    **dict.fromkeys(("gpu_memcpy", "memcpy"), "copies"),
    **dict.fromkeys(("gpu_memset", "memset"), "memory sets"),
}
RUNTIME = ("cuda_runtime", "cuda_driver", "runtime", "hip_runtime")
ANNOTATION = "user_annotation"
LEFT_OUT = ("gpu_user_annotation", "python_function", "trace", "overhead", "ac2g", "async_cpu_to_gpu", "cuda_sync")
WHOLE_STEP = "ProfilerStep"
ORDER: tuple[Kind, ...] = ("kernels", "copies", "memory sets", "thread")
NO_CORRELATION = -1


@dataclass(frozen=True, slots=True, eq=False)
class Track:
    """What ran on one stream or thread, N spans in order of their starts; span i is called ``names[name_of[i]]``."""

    name: str
    kind: Kind
    device: int | None
    names: tuple[str, ...]
    name_of: np.ndarray  # [N] int64
    start_s: np.ndarray  # [N] float64
    end_s: np.ndarray  # [N] float64
    correlation: np.ndarray  # [N] int64, of the runtime call that launched it, or -1
    nbytes: int = 0  # copied, where the trace says

    @property
    def cover(self) -> Cover:
        return union(self.start_s, self.end_s)


@dataclass(frozen=True, slots=True)
class TrackOverlap:
    """How long one track was busy, and how much of that lay under others: copies under kernels of their device, kernels under
    those of other streams, a thread's work under that of other threads."""

    name: str
    kind: Kind
    spans: int
    busy_s: float
    hidden_s: float
    nbytes: int

    @property
    def exposed_s(self) -> float:
        return max(0.0, self.busy_s - self.hidden_s)

    @property
    def hidden_fraction(self) -> float:
        return self.hidden_s / self.busy_s if self.busy_s > 0 else math.nan


@dataclass(frozen=True, slots=True)
class Alignment:
    """What causes and effects say about the device's clock: adding x to its times is possible for least_s <= x <= most_s only.

    No kernel begins before its launch, which gives ``least_s`` (of ``launches``); none ends after a synchronisation that
    waited for it, which gives ``most_s`` (None without any, or with several devices). Times are shown as they were recorded.
    """

    least_s: float
    most_s: float | None
    launches: int
    synchronisations: int

    @property
    def error_s(self) -> float:
        """How far the clocks may be apart, at most as far as this trace can tell."""
        return max(abs(self.least_s), abs(self.most_s or 0.0))

    @property
    def in_order(self) -> bool:
        """Whether the times as recorded break no order of cause and effect."""
        return self.least_s <= 0.0 and (self.most_s is None or self.most_s >= 0.0)

    def __str__(self) -> str:
        waits = f"{self.synchronisations:,} synchronisation{'s' * (self.synchronisations != 1)}"
        seen = f"{self.launches:,} launch{'es' * (self.launches != 1)} and {waits}"
        if not self.in_order:
            off = max(self.least_s, -(self.most_s or 0.0))
            return f"the device's clock is off by at least {1e6 * off:.1f} us, by {seen}; not corrected"
        if self.most_s is None:
            return f"alignment error of the device's clock: at most {-1e6 * self.least_s:.1f} us late by {seen}, early unknown"
        return f"alignment error of the device's clock: {1e6 * self.least_s:.1f} to +{1e6 * self.most_s:.1f} us, by {seen}"


@dataclass(frozen=True, eq=False)
class Profile:
    """An imported trace. ``left_out`` counts what no track shows; ``base_time_ns`` is Unix time at the trace's zero."""

    name: str
    device: str
    tracks: tuple[Track, ...]
    alignment: Alignment | None = None
    base_time_ns: int | None = None
    zero_us: float = 0.0  # of our times, on the trace's own axis
    launches: tuple[np.ndarray, np.ndarray, np.ndarray] = field(default_factory=lambda: (np.zeros(0), np.zeros(0), np.zeros(0)))
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def spans(self) -> int:
        return sum(len(track.start_s) for track in self.tracks)

    @property
    def length_s(self) -> float:
        return max(float(track.end_s.max()) for track in self.tracks)

    def seconds_at(self, time_ns: int) -> float:
        """Where a ``time.time_ns()`` lies on our axis: the trace's times are microseconds after ``baseTimeNanoseconds``."""
        if self.base_time_ns is None:
            raise InputError(
                f"{self.name} does not say when it began (baseTimeNanoseconds), so Unix times cannot be placed in it"
            )
        return ((time_ns - self.base_time_ns) / 1e3 - self.zero_us) / 1e6

    @cached_property
    def compute(self) -> dict[int | None, Cover]:
        """When each device ran any kernel."""
        found = defaultdict(list)
        for track in self.tracks:
            if track.kind == "kernels":
                found[track.device].append(track)
        return {device: _joined(tracks) for device, tracks in found.items()}

    @cached_property
    def overlaps(self) -> tuple[TrackOverlap, ...]:
        """Of every track, in the order of ``tracks``."""
        found = []
        for track in self.tracks:
            if track.kind in ("copies", "memory sets"):
                others = self.compute.get(track.device, (np.zeros(0), np.zeros(0)))
            else:
                alike = [t for t in self.tracks if t is not track and (t.kind, t.device) == (track.kind, track.device)]
                others = _joined(alike)
            busy = track.cover
            found.append(
                TrackOverlap(track.name, track.kind, len(track.start_s), length(busy), shared(busy, others), track.nbytes)
            )
        return tuple(found)

    def arrows(self, start_s: float, end_s: float, most: int) -> list[tuple[str, float, str, float]]:
        """From launch to kernel or copy, for those between two times: thread, time, stream, time. Nothing if over ``most``."""
        number, when, thread = self.launches
        found: list[tuple[str, float, str, float]] = []
        for track in self.tracks:
            if track.kind == "thread" or not len(number):
                continue
            first, last = np.searchsorted(track.start_s, [start_s, end_s])
            place = np.searchsorted(number, track.correlation[first:last])
            place = np.minimum(place, len(number) - 1)
            known = np.flatnonzero(number[place] == track.correlation[first:last])
            if len(found) + len(known) > most:
                return []
            found += [
                (self.tracks[int(thread[place[i]])].name, float(when[place[i]]), track.name, float(track.start_s[first + i]))
                for i in known
                if start_s <= when[place[i]]
            ]
        return found


def overlap_lines(profile: Profile) -> list[str]:
    """The overlaps as a table of plain text, and what must be known about the clocks."""
    width = max(len(x.name) for x in profile.overlaps)
    lines = [f"{profile.name}: {profile.spans:,} spans in {1e3 * profile.length_s:,.3f} ms, recorded on {profile.device}"]
    lines.append(f"{'':{width}} {'busy, ms':>14} {'under others':>14} {'exposed':>14} {'hidden':>7}")
    for x in profile.overlaps:
        times = "".join(f" {1e3 * seconds:14,.3f}" for seconds in (x.busy_s, x.hidden_s, x.exposed_s))
        lines.append(f"{x.name:{width}}{times} {x.hidden_fraction:7.0%}" if x.busy_s else f"{x.name:{width}}{times}")
    return [*lines, str(profile.alignment)] if profile.alignment else lines


def _joined(tracks: Sequence[Track]) -> Cover:
    if not tracks:
        return np.zeros(0), np.zeros(0)
    return union(np.concatenate([t.start_s for t in tracks]), np.concatenate([t.end_s for t in tracks]))


class _Rows:
    """Columns of one track while events are read."""

    def __init__(self) -> None:
        self.start: list[Any] = []
        self.duration: list[Any] = []
        self.name: list[int] = []
        self.correlation: list[int] = []
        self.event: list[int] = []
        self.nbytes = 0


def profile_of(document: dict[str, Any], events: list[Any], name: str) -> Profile:
    """Sort the complete spans (``ph`` "X") of a trace into tracks. Raises InputError naming the first event that is no good."""
    rows: dict[tuple[Any, ...], _Rows] = defaultdict(_Rows)
    known: dict[str, int] = {}
    threads: dict[tuple[Any, Any], str] = {}
    calls: list[tuple[int, Any, Any, tuple[Any, Any], str]] = []  # runtime calls: correlation, ts, dur, thread, name
    left_out: dict[str, int] = defaultdict(int)
    for i, event in enumerate(events):
        if type(event) is not dict:
            raise InputError(f"{name}: event {i} is {event!r:.40}, not an object with ph, name and ts")
        kind = event.get("ph")
        if kind == "M" and event.get("name") == "thread_name":
            threads[_hashable(event.get("pid")), _hashable(event.get("tid"))] = str(_arguments(event).get("name", ""))
        if kind != "X":
            continue
        category, label = str(event.get("cat", "")).lower(), str(event.get("name", ""))
        if category in LEFT_OUT or label.startswith(WHOLE_STEP):
            left_out[WHOLE_STEP if label.startswith(WHOLE_STEP) else category] += 1
            continue
        arguments = _arguments(event)
        where = (_hashable(event.get("pid")), _hashable(event.get("tid")))
        on_device = ON_DEVICE.get(category)
        if on_device:
            key: tuple[Any, ...] = (on_device, arguments.get("device", where[0]), arguments.get("stream", where[1]))
            key = tuple(map(_hashable, key))
        else:
            key = (ANNOTATION if category == ANNOTATION else "thread", *where)
        row = rows[key]
        row.start.append(event.get("ts"))
        row.duration.append(event.get("dur"))
        row.name.append(known.setdefault(label, len(known)))
        row.event.append(i)
        correlation = arguments.get("correlation", NO_CORRELATION)
        row.correlation.append(correlation if type(correlation) is int and 0 <= correlation < 2**62 else NO_CORRELATION)
        if on_device == "copies" and type(arguments.get("bytes")) is int:
            row.nbytes += arguments["bytes"]
        if category in RUNTIME:
            calls.append((row.correlation[-1], event.get("ts"), event.get("dur"), where, label))
    if not rows:
        raise InputError(f"{name} holds no complete spans (ph X) of a profiler among its {len(events):,} events")

    for key in [key for key in rows if key[0] == ANNOTATION]:  # a thread without operators is shown by its annotations
        annotated = rows.pop(key)
        if ("thread", *key[1:]) in rows:
            left_out[ANNOTATION] += len(annotated.start)
        else:
            rows["thread", *key[1:]] = annotated
    times = {key: _checked_times(row, name) for key, row in rows.items()}
    zero = min(float(start.min()) for start, _ in times.values())
    names = tuple(known)
    several = len({key[1] for key in rows if key[0] != "thread"}) > 1
    keys = sorted(rows, key=lambda key: (ORDER.index(key[0]) > 2, str(key[1]), _natural(key[2]), ORDER.index(key[0])))
    tracks = tuple(_track(key, rows[key], times[key], zero, names, _title(key, threads, several, keys)) for key in keys)
    places = {key[1:]: i for i, key in enumerate(keys) if key[0] == "thread"}
    number, start, end, thread, synchronises = _calls(calls, places, zero)
    base = document.get("baseTimeNanoseconds")
    return Profile(
        name=name,
        device=_devices(document),
        tracks=tracks,
        alignment=_alignment(tracks, number, start, end, synchronises),
        base_time_ns=base if type(base) is int else None,
        zero_us=zero,
        launches=_sorted_launches(number, start, thread),
        left_out=dict(left_out),
    )


def _arguments(event: dict[str, Any]) -> dict[str, Any]:
    arguments = event.get("args")
    return arguments if type(arguments) is dict else {}


def _hashable(value: Any) -> Any:
    return value if isinstance(value, int | str) or value is None else str(value)


def _natural(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, int) else (1, str(value))


def _checked_times(row: _Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Starts and durations in microseconds as float64; InputError for what is no number, not finite or negative."""
    columns = []
    for what, values in (("ts", row.start), ("dur", row.duration)):
        try:
            column = np.array(values)
        except ValueError:  # lists of different lengths
            column = np.array(values, object)
        if column.dtype.kind not in "fiu" or column.ndim != 1:
            bad = next(
                i for i, v in enumerate(values) if not isinstance(v, int | float) or isinstance(v, bool) or abs(v) > 2**63
            )
            raise InputError(f"{name}: event {row.event[bad]} has {what} {values[bad]!r:.40}, not a number of microseconds")
        column = column.astype(np.float64)
        wrong = ~np.isfinite(column) | ((column < 0) if what == "dur" else (np.abs(column) > 1e17))
        if wrong.any():
            bad = int(np.argmax(wrong))
            raise InputError(
                f"{name}: event {row.event[bad]} has {what} {values[bad]!r:.40}; expected finite microseconds, dur >= 0"
            )
        columns.append(column)
    return columns[0], columns[1]


def _title(key: tuple[Any, ...], threads: dict[tuple[Any, Any], str], several: bool, keys: list[tuple[Any, ...]]) -> str:
    kind, where, line = key
    if kind != "thread":
        return f"{f'device {where} ' if several else ''}stream {line}: {kind}"
    title = threads.get((where, line), "") or f"thread {line}"
    alike = [k for k in keys if k[0] == "thread" and (threads.get((k[1], k[2]), "") or f"thread {k[2]}") == title]
    return title if len(alike) == 1 else f"{title} [{where}/{line}]"


def _track(
    key: tuple[Any, ...], row: _Rows, times: tuple[np.ndarray, np.ndarray], zero: float, names: tuple[str, ...], title: str
) -> Track:
    order = np.argsort(times[0], kind="stable")
    used, name_of = np.unique(np.array(row.name)[order], return_inverse=True)
    start = (times[0][order] - zero) / 1e6
    device = key[1] if key[0] != "thread" and isinstance(key[1], int) else None
    correlation = np.array(row.correlation, np.int64)[order]
    called = tuple(names[i] for i in used)
    return Track(title, key[0], device, called, name_of, start, start + times[1][order] / 1e6, correlation, row.nbytes)


def _calls(
    calls: list[tuple[int, Any, Any, tuple[Any, Any], str]], places: dict[tuple[Any, ...], int], zero: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Runtime calls as columns; their times have been checked with the threads they belong to."""
    number = np.array([c[0] for c in calls], np.int64)
    start = (np.array([c[1] for c in calls], np.float64) - zero) / 1e6
    end = start + np.array([c[2] for c in calls], np.float64) / 1e6
    thread = np.array([places[c[3]] for c in calls], np.int64)
    return number, start, end, thread, np.array(["DeviceSynchronize" in c[4] for c in calls], bool)


def _sorted_launches(number: np.ndarray, start: np.ndarray, thread: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    kept = number != NO_CORRELATION
    order = np.argsort(number[kept], kind="stable")
    return number[kept][order], start[kept][order], thread[kept][order]


def _alignment(
    tracks: tuple[Track, ...], number: np.ndarray, start: np.ndarray, end: np.ndarray, synchronises: np.ndarray
) -> Alignment | None:
    """From every pair of launch and kernel, and every wait for a whole device; None where nothing links host and device."""
    on_device = [t for t in tracks if t.kind != "thread"]
    if not on_device or not len(number):
        return None
    known, when, _ = _sorted_launches(number, start, number)
    if not len(known):
        return None
    correlation, begins, ends = (
        np.concatenate([getattr(t, f) for t in on_device]) for f in ("correlation", "start_s", "end_s")
    )
    place = np.minimum(np.searchsorted(known, correlation), len(known) - 1)
    matched = (correlation != NO_CORRELATION) & (known[place] == correlation)
    if not matched.any():
        return None
    launched, begins, ends = when[place[matched]], begins[matched], ends[matched]
    least, most, waits = float(np.max(launched - begins)), None, 0
    if len({t.device for t in on_device}) == 1 and synchronises.any():
        order = np.argsort(launched, kind="stable")
        latest = np.maximum.accumulate(ends[order])  # of all launched so far
        before = np.searchsorted(launched[order], start[synchronises], side="left")
        room = end[synchronises][before > 0] - latest[before[before > 0] - 1]
        most, waits = (float(room.min()), len(room)) if len(room) else (None, 0)
    return Alignment(least, most, int(matched.sum()), waits)


def _devices(document: dict[str, Any]) -> str:
    """Names of the devices a trace was recorded on, as far as it says."""
    found = document.get("deviceProperties")
    names = [str(d.get("name")) for d in found if isinstance(d, dict) and d.get("name")] if isinstance(found, list) else []
    counted = {name: names.count(name) for name in names}
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counted.items()) or "a CPU, by its threads"
