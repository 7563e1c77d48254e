"""Does compute hide the lookup, and can it be told beforehand? Windows of 5 to 50 ms, a grid of stalls, and decoding a toy.

    workbench bench overlap                    the emulated device, real compute on the CPU, and CUDA where there is some
    workbench bench overlap --quick            few rounds: does it run?

Rows are chosen so that a lookup takes about half a window. The grid predicts the stall of 36 combinations of rows, window and
contention from lookups, windows and hand-offs measured apart, then runs them. On a busy machine the emulated device still shows
what overlap can do, since its compute needs no core; real compute does not. The record, with the machine and how busy it was,
goes to ``benchmarks/results/overlap-<device>.json``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

import workbench as wb
from benchmarks import _record
from workbench.memory.executors import EmulatedDevice
from workbench.memory.overlap import Lab, OverlapResult, overlap_experiment
from workbench.memory.predict import OverlapGrid, lookup_alone, overlap_grid
from workbench.memory.prefetch import POLICIES

WINDOWS_MS = (5.0, 10.0, 20.0, 50.0)
BARS = {"over ideal": 0.06, "hidden": 0.9, "prediction error": 0.15, "points": 27, "failing": 9}
QUIET = 0.25  # cores that other processes may keep busy
DECODED = 64


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="workbench bench overlap")
    parser.add_argument("--quick", action="store_true", help="few rounds, and no record is written")
    options = parser.parse_args(arguments)
    rounds = 3 if options.quick else 15
    executors = ["emulated", "cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    found = _record.begin("overlap", bars=BARS, windows=[])
    print(f"{found['machine']['device']}, niceness {found['niceness']}\n")
    per_row = seconds_per_row()
    for executor in executors:
        for window in WINDOWS_MS:
            rows = max(1024, round(window / 1e3 / 2 / per_row / 1024) * 1024)
            result = overlap_experiment(executor, window_ms=window, rows_per_lookup=rows, rounds=rounds)
            print(f"window {window:g} ms, {rows:,} rows\n{result.summary()}\n{verdict(result)}\n", flush=True)
            found["windows"].append(plain(result))
    grid = overlap_grid(rounds=3 if options.quick else 25)
    found["grid"] = plain_grid(grid)
    print(f"{grid.summary()}\n{grid_verdict(grid)}\n", flush=True)
    found["decode ms a token"] = decode(3 if options.quick else 9)
    print(f"tiny-v4-engram, decoding: {found['decode ms a token']} ms a token")
    if not options.quick:
        _record.store(found)


def seconds_per_row() -> float:
    """Hash and gather of one row of the default table here, the median of several lookups."""
    lab, rows = Lab(EmulatedDevice()), 48 * 1024
    try:
        return statistics.median(lookup_alone(lab, rows)[1] for _ in range(9)) / rows
    finally:
        lab.close()


def verdict(result: OverlapResult) -> str:
    """On the CPU compute and lookup share cores and memory, so nothing is promised there."""
    if result.executor == "cpu":
        return "no bar: what real compute and a real lookup leave each other depends on the cores"
    met = result.over_ideal <= BARS["over ideal"] and result.hidden_fraction >= BARS["hidden"]
    foreign = result.foreign_cores
    busy = foreign is None or foreign > QUIET
    return f"bars (6 % over the ideal, 0.9 hidden): {'met' if met else 'not met'}{' on a busy machine' if busy else ''}"


def grid_verdict(grid: OverlapGrid) -> str:
    met = grid.median_error <= BARS["prediction error"]
    met &= len(grid.points) >= BARS["points"] and len(grid.failing) >= BARS["failing"]
    return f"bars (15 % median error, 27 points, 9 failing): {'met' if met else 'not met'}"


def plain(result: OverlapResult) -> dict[str, Any]:
    return {
        "executor": result.executor,
        "window ms": result.window_ms,
        "rows": result.rows_per_lookup,
        "table": result.table,
        "median ms": result.median_ms,
        "p10 ms": result.p10_ms,
        "lookup ms": result.lookup_ms,
        "hidden fraction": result.hidden_fraction,
        "saved fraction": result.saved_fraction,
        "exposed ms": result.exposed_ms,
        "over ideal": result.over_ideal,
        "load average": result.load_average,
        "foreign cores": result.foreign_cores,
    }


def plain_grid(grid: OverlapGrid) -> dict[str, Any]:
    points = [
        {k: v for k, v in asdict(p).items() if k != "rounds_ms"} | {"relative_error": p.relative_error} for p in grid.points
    ]
    return {
        "points": [{k: (None if v != v else v) for k, v in p.items()} for p in points],  # no NaN in JSON
        "failing": len(grid.failing),
        "median relative error": grid.median_error,
        "slowdowns": grid.slowdowns,
        "load average": grid.load_average,
        "foreign cores": grid.foreign_cores,
    }


def decode(rounds: int) -> dict[str, float]:
    """Milliseconds to decode a token with each policy, in turn: a toy's lookup is so short that handing it over shows."""
    model = wb.load("tiny-v4-engram", device="cpu")
    ids = torch.arange(64).unsqueeze(0) % model.config.vocab_size
    found: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    with torch.inference_mode():
        for number in range(-1, rounds):
            for policy in POLICIES:
                cache = model.new_cache()
                model(ids, cache, prefetch=policy)
                start = time.perf_counter()
                for t in range(DECODED):
                    model(ids[:, t : t + 1], cache, logits="last", prefetch=policy)
                if number >= 0:
                    found[policy].append(1e3 * (time.perf_counter() - start) / DECODED)
    model.fetcher.close()
    return {policy: round(statistics.median(times), 3) for policy, times in found.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
