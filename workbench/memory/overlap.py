"""When does compute hide the lookup? Four runs of the same work in turn, and a grid of stalls predicted and then measured.

A run is a row of compute blocks with Engram lookups in front of some of them, ``RowFetcher`` fetching the rows as in a model;
the run ends when the last of these layers has its rows. Every chart names the executor: who computed.
(reference/engram-and-overlap.md, sections 3, 4.6 and 5)
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.errors import InputError, WorkbenchError
from workbench.memory.executors import EXECUTORS, NAMES, HostExecutor, executor_named
from workbench.memory.prefetch import Lookup, RowFetcher
from workbench.memory.rows import TableSource
from workbench.runtime import size_text, threads_for_run, use_threads
from workbench.trace import Span, Timeline

RUNS = ("compute-only", "lookup-only", "serial", "prefetched")
TABLE_ROWS, TABLE_WIDTH = 2**19, 256  # float16: 256 MiB, far more than a CPU's caches hold
ROWS_PER_LOOKUP = 24 * 1024  # a chunk of 1,024 tokens with the 24 rows each that V4.1-Flash reads in a layer
WARM_UP = 2
CHECKED = 4  # rows of every lookup compared with the table
MOST_WINDOW_MS, MOST_LAYERS = 10_000.0, 1000
MODELLED_ROW_S, MODELLED_HASH_S = 100e-9, 10e-9  # per row: one core gathers at 60 to 150 ns, hashes at 3 to 50 (section 3)
MIXERS = (2654435761, 40503, 2246822519)  # odd factors of the experiment's hash

Progress = Callable[[float], None]
Stop = Callable[[], bool]


class RandomTable:
    """Random float16 rows in memory, made for timing; reads like ``wb.EngramTable``."""

    in_memory = True

    def __init__(self, rows: int = TABLE_ROWS, width: int = TABLE_WIDTH, seed: int = 0) -> None:
        self.rows, self.width = rows, width
        bits = np.random.default_rng(seed).integers(0, 2**16, rows * width // 4 + 1, dtype=np.uint64)
        self.values = bits.view(np.float16)[: rows * width].reshape(rows, width)

    def gather(self, row_ids: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        if out is None:
            return self.values[row_ids]
        return np.take(self.values, row_ids, axis=0, out=out, mode="clip")  # "clip" writes into out directly


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapResult:
    """What an experiment found. ``timelines``: name of a run -> its median round; ``totals_ms``: all rounds of each.

    ``hidden_fraction`` = 1 - stall / lookup of the prefetched run; ``saved_fraction`` = (serial - prefetched) /
    min(compute window, lookup), which contention lowers even where spans overlap completely.
    """

    executor: str
    timelines: dict[str, Timeline]
    totals_ms: dict[str, tuple[float, ...]]
    table: str
    rows_per_lookup: int
    window_ms: float
    layers: tuple[int, ...]
    load_average: float | None = None
    foreign_cores: float | None = None  # what other processes kept busy meanwhile

    @property
    def median_ms(self) -> dict[str, float]:
        return {name: statistics.median_low(values) for name, values in self.totals_ms.items()}

    @property
    def p10_ms(self) -> dict[str, float]:
        return {name: float(np.quantile(values, 0.1)) for name, values in self.totals_ms.items()}

    @property
    def hidden_fraction(self) -> float:
        return 1.0 - self.exposed_ms / self.lookup_ms

    @property
    def exposed_ms(self) -> float:
        return 1e3 * self.timelines["prefetched"].stall_s

    @property
    def lookup_ms(self) -> float:
        """Hash and gather, and copy where there is one, of the prefetched run."""
        spans = self.timelines["prefetched"].spans
        return 1e3 * sum(s.end_s - s.start_s for s in spans if s.lane in ("lookup", "transfer"))

    @property
    def saved_fraction(self) -> float:
        m = self.median_ms
        return (m["serial"] - m["prefetched"]) / min(m["compute-only"], m["lookup-only"])

    @property
    def over_ideal(self) -> float:
        """Prefetched time over max(compute, lookup), less one: 0 is as good as it gets with one Engram layer."""
        m = self.median_ms
        return m["prefetched"] / max(m["compute-only"], m["lookup-only"]) - 1.0

    @property
    def load(self) -> str:
        average = "unknown" if self.load_average is None else f"{self.load_average:.2f}"
        foreign = "" if self.foreign_cores is None else f", other processes kept {self.foreign_cores:.2f} cores busy"
        return f"load average {average}{foreign}"

    def summary(self) -> str:
        """The numbers, a line each."""
        m, low = self.median_ms, self.p10_ms
        rounds = len(self.totals_ms["serial"])
        lines = [f"executor {NAMES[self.executor]}; {self.timelines['prefetched'].origin}; {rounds} round(s); {self.load}"]
        lines += [f"{name:12} {m[name]:8.2f} ms median, {low[name]:8.2f} ms p10" for name in RUNS]
        lines.append(
            f"hidden {self.hidden_fraction:.1%} of a lookup of {self.lookup_ms:.2f} ms, {self.exposed_ms:.2f} ms exposed; "
            f"saved {self.saved_fraction:.1%} of what could be saved; {self.over_ideal:+.1%} over the ideal"
        )
        return "\n".join(lines)


def overlap_experiment(
    executor: str = "emulated",
    *,
    table: Any = None,
    rows_per_lookup: int = ROWS_PER_LOOKUP,
    window_ms: float = 20.0,
    layers: Sequence[int] = (1,),
    rounds: int = 9,
    seed: int = 0,
    progress: Progress | None = None,
    should_stop: Stop | None = None,
) -> OverlapResult:
    """Compute only, lookup only, serial and prefetched, interleaved for ``rounds`` rounds after two that are not counted.

    ``executor``: "emulated" (a window is a timed wait, the lookup is real), "cpu" (both real), "cuda", or "modelled" (a
    virtual clock: nothing runs, one round). Each block before the last of ``layers`` (0 is the first block) computes for
    ``window_ms``; each of ``layers`` reads ``rows_per_lookup`` rows of ``table``, a ``wb.EngramTable`` or by default random
    rows in memory. Rows are drawn anew for every run and some are compared with the table.
    Raises InputError for settings that cannot be used, WorkbenchError when stopped or when rows came out wrong.
    """
    layers = _checked(executor, rows_per_lookup, window_ms, layers, rounds)
    if executor == "modelled":
        if table is not None:
            raise InputError("executor 'modelled' reads no table; leave it out, or use 'emulated', 'cpu' or 'cuda'")
        return _modelled(rows_per_lookup, window_ms, layers)
    say, stopped = progress or (lambda share: None), should_stop or (lambda: False)
    use_threads(threads_for_run())
    lab = Lab(executor_named(executor), table, seed)
    found: dict[str, list[tuple[float, Timeline]]] = {name: [] for name in RUNS}
    order = np.random.default_rng(seed)
    count = (WARM_UP + rounds) * len(RUNS)
    try:
        with Load() as load:
            lab.executor.prepare()
            for number in range(WARM_UP + rounds):
                for place, name in enumerate(order.permutation(RUNS)):
                    go_on(stopped)
                    seconds, timeline = lab.run(str(name), rows_per_lookup, window_ms / 1e3, layers)
                    if number >= WARM_UP:
                        found[str(name)].append((seconds, timeline))
                    say((number * len(RUNS) + place + 1) / count)
    finally:
        lab.close()
    median = {name: sorted(of, key=lambda pair: pair[0])[(rounds - 1) // 2][1] for name, of in found.items()}
    return OverlapResult(
        executor=executor,
        timelines=median,
        totals_ms={name: tuple(1e3 * seconds for seconds, _ in of) for name, of in found.items()},
        table=lab.about,
        rows_per_lookup=rows_per_lookup,
        window_ms=window_ms,
        layers=layers,
        load_average=load.average,
        foreign_cores=load.foreign_cores,
    )


def _checked(executor: str, rows: int, window_ms: float, layers: Sequence[int], rounds: int) -> tuple[int, ...]:
    if executor not in EXECUTORS:
        raise InputError(f"executor must be one of {EXECUTORS}, got {executor!r}")
    for name, value in (("rows_per_lookup", rows), ("rounds", rounds)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a positive whole number, got {value!r}")
    if not isinstance(window_ms, int | float) or not 0 < window_ms <= MOST_WINDOW_MS:
        raise InputError(f"window_ms must lie above 0 and be at most {MOST_WINDOW_MS:g}, got {window_ms!r}")
    try:
        wanted = tuple(sorted(set(layers)))
    except TypeError:
        wanted = ()
    if not wanted or not all(isinstance(layer, int) and 1 <= layer <= MOST_LAYERS for layer in wanted):
        raise InputError(f"layers must be numbers from 1 to {MOST_LAYERS}, one at least, got {layers!r}")
    return wanted


def _modelled(rows: int, window_ms: float, layers: tuple[int, ...]) -> OverlapResult:
    """The same four runs on the virtual clock, with the reference's figures for one core."""
    from workbench.schedule import Fetch, plan

    blocks = [window_ms / 1e3] * max(layers) + [0.0]
    fetches = [Fetch(layer=n, hash_s=rows * MODELLED_HASH_S, gather_s=rows * MODELLED_ROW_S) for n in layers]
    about = f"modelled rows at {1e9 * MODELLED_ROW_S:g} ns each and {1e9 * MODELLED_HASH_S:g} ns to hash"
    timelines: dict[str, Timeline] = {}
    totals: dict[str, tuple[float, ...]] = {}
    for name, policy in zip(RUNS, ("resident", "prefetch", "serial", "prefetch"), strict=True):
        note = f"{name}; executor {NAMES['modelled']}; windows of {window_ms:g} ms, {rows:,} rows a lookup; {about}"
        found = plan([0.0] * len(blocks) if name == "lookup-only" else blocks, fetches, policy)  # type: ignore[arg-type]
        lanes = ("ids", "lookup", "transfer") if name == "lookup-only" else ("ids", "compute", "lookup", "transfer", "stall")
        spans = tuple(span for span in found.timeline.spans if span.lane in lanes)
        timelines[name], totals[name] = Timeline("modelled", spans, "modelled device", note), (1e3 * found.total_s,)
    return OverlapResult(
        executor="modelled",
        timelines=timelines,
        totals_ms=totals,
        table=about,
        rows_per_lookup=rows,
        window_ms=window_ms,
        layers=layers,
    )


class Lab:
    """One executor, one table and one fetcher; ``run`` times one run of any kind."""

    def __init__(self, executor: HostExecutor, table: Any = None, seed: int = 0) -> None:
        self.executor = executor
        self.source = TableSource(RandomTable(seed=seed) if table is None else table)
        nbytes, values = self.source.rows * self.source.width * self.source.dtype.itemsize, str(self.source.dtype)[6:]
        stored = getattr(table, "dtype", None)
        kind = "random rows in memory" if table is None else type(table).__name__
        kind += f" stored as {stored}" if isinstance(stored, str) else ""
        self.about = f"{kind}, {self.source.rows:,} rows of {self.source.width} values, {size_text(nbytes)} as {values}"
        self.fetcher = RowFetcher()
        self._draw = np.random.default_rng(seed)

    def close(self) -> None:
        self.fetcher.close()

    def hash_rows(self, count: int) -> Callable[[], Tensor]:
        """Hashes ``count`` fresh random n-grams to row numbers [count, 1], at Engram's cost: XOR of products, modulo."""
        ids = torch.from_numpy(self._draw.integers(0, 2**31, count + 1))

        def work() -> Tensor:
            mix = (ids[1:] * MIXERS[0]) ^ (ids[:-1] * MIXERS[1]) ^ MIXERS[2]
            return (mix % self.source.rows).view(-1, 1)

        return work

    def run(self, name: str, rows: int, window_s: float, layers: Sequence[int]) -> tuple[float, Timeline]:
        """(seconds in all, timeline) of one run: a name of RUNS. The note says what was done and by whom."""
        policy = "serial" if name == "serial" else "prefetch"
        hashes = {layer: self.hash_rows(rows) for layer in layers if name != "compute-only"}
        lookups: list[tuple[Lookup, Any, Any]] = []
        blocks: list[tuple[int, Any]] = []
        kept: list[tuple[Tensor, Tensor]] = []
        with torch.inference_mode():
            begin = end = time.perf_counter()
            fetches = {
                layer: self.fetcher.start(layer, work, self.source, policy, self.executor) for layer, work in hashes.items()
            }
            try:
                for layer in range(max(layers) + 1):
                    if layer in fetches:
                        if policy == "serial":
                            self.executor.finish()  # only now does compute need the rows; the host may be ahead of a device
                        arrived = self.executor.mark()
                        lookup = fetches[layer].result()
                        lookups.append((lookup, arrived, self.executor.mark()))
                        if layer == max(layers):
                            self.executor.finish()
                            end = time.perf_counter()  # what follows is not part of the run
                        kept.append((lookup.rows[:CHECKED, 0], lookup.memory[:CHECKED].clone()))
                        fetches[layer].release()
                    if layer < max(layers) and name != "lookup-only":
                        blocks.append((layer, self.executor.block(window_s)))
                if not fetches:
                    self.executor.finish()
                    end = time.perf_counter()
            finally:
                for fetch in fetches.values():
                    fetch.release()
        self._check(kept)
        spans = self._spans(name, begin, lookups, blocks)
        note = (
            f"{name}; executor {NAMES[self.executor.name]}; windows of {1e3 * window_s:g} ms before layer(s) "
            f"{', '.join(map(str, layers))}, {rows:,} rows a lookup; table: {self.about}{self._alignment()}"
        )
        return end - begin, Timeline("measured", spans, self.executor.label, note)

    def _alignment(self) -> str:
        error = getattr(self.executor, "alignment_error_s", 0.0)
        return f"; the device's clock is aligned to within {1e6 * error:.0f} us" if error else ""

    def _check(self, kept: list[tuple[Tensor, Tensor]]) -> None:
        for rows, memory in kept:
            wanted, got = self.source.gather(rows).contiguous(), memory.cpu().contiguous()
            if wanted.numpy().tobytes() != got.numpy().tobytes():
                raise WorkbenchError(f"rows {rows.tolist()} came out of the staging buffer with other values than the table's")

    def _spans(
        self, name: str, begin: float, lookups: list[tuple[Lookup, Any, Any]], blocks: list[tuple[int, Any]]
    ) -> tuple[Span, ...]:
        """Token ids -> hash -> gather -> copy, where there is one -> the layer; what compute waited is a stall."""
        spans: list[Span] = []

        def add(lane: str, what: str, start: float, end: float, *after: str) -> None:
            start = max(0.0, start - begin)
            spans.append(Span(lane, what, 0, start, max(start, end - begin), "measured", after))

        if lookups:
            add("ids", "token ids", begin, min(lookup.asked_s for lookup, *_ in lookups))
        last: dict[int, str] = {}
        for lookup, arrived, went_on in lookups:
            layer = f"layer {lookup.layer}"
            add("lookup", f"{layer} hash", lookup.started_s, lookup.hashed_s, "token ids")
            add("lookup", f"{layer} gather", lookup.gather_from_s, lookup.gathered_s, f"{layer} hash")
            last[lookup.layer], there, copied = f"{layer} gather", lookup.gathered_s, lookup.copied()
            if copied is not None:
                add("transfer", f"{layer} copy", copied.start_s, copied.end_s, last[lookup.layer])
                last[lookup.layer], there = f"{layer} copy", copied.end_s
            start, free = self.executor.times(arrived)[0], self.executor.times(went_on)[1]
            if there > start and name != "lookup-only":  # there, nothing stands still
                add("stall", f"{layer} waits", start, free, last[lookup.layer])
            if lookup.layer not in dict(blocks) and name != "lookup-only":  # the run ends as this layer has its rows
                add("compute", layer, free, free, last[lookup.layer])
        for number, mark in blocks:
            add("compute", f"layer {number}", *self.executor.times(mark), *([last[number]] if number in last else []))
        return tuple(spans)


class Load:
    """How busy other processes kept the machine while the block ran: ``foreign_cores``, and the load average at its end."""

    average: float | None = None
    foreign_cores: float | None = None

    def __enter__(self) -> Load:
        self._before = _busy_s(), _own_s(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        busy, own, began = self._before
        self.average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        now, elapsed = _busy_s(), time.perf_counter() - began
        if busy is not None and now is not None and elapsed > 0:
            self.foreign_cores = max(0.0, (now - busy - (_own_s() - own)) / elapsed)


def _busy_s() -> float | None:
    """Core seconds that all processes of this machine have computed, or None where the system does not say."""
    try:
        with open("/proc/stat", encoding="ascii") as stat:
            user, nice, system = map(int, stat.readline().split()[1:4])
    except (OSError, ValueError):
        return None
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    """Core seconds of this process and of those it started that have ended."""
    return sum(os.times()[:4])


def go_on(stopped: Stop) -> None:
    if stopped():
        raise WorkbenchError("the experiment was stopped; nothing was kept of it")
