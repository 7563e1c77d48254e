"""What a row of an Engram table costs: gathered in memory, from the mapped file, from the disk, and through a hot-row cache.

    workbench bench engram                     a table of 1 GiB, written for this and removed again
    workbench bench engram --quick             16 MiB, few rounds, no record: does it run?

Rows of 80 float16 values as in the reference's measurements; the cache reads rows of V4.1's size, 256 values in 264 bytes.
Everything that is compared is done in turn, round after round; medians and their ratio are shown. "Cold" rows were dropped from
the system's memory before each call. The record goes to ``benchmarks/results/engram-<device>.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import workbench as wb
from workbench.errors import InputError, WorkbenchError
from workbench.live import encode
from workbench.memory.hot_rows import HotRows
from workbench.memory.table import EngramTable
from workbench.needle import sample_text
from workbench.runtime import available_bytes, machine, size_text, slug

WIDTH, TOTAL = 80, 2**30  # values of a row; bytes of the largest table
SIZES = (2**24, 2**26, 2**28, 2**30)
GATHERED, COLD = 60_000, 500  # rows in one call
BAR = 1.1  # gather / numpy.take
CACHE_SHARES = (0.01, 0.05, 0.25)  # of the table's rows
RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="workbench bench engram")
    parser.add_argument("--quick", action="store_true", help="a small table and few rounds; no record is written")
    parser.add_argument("--folder", type=Path, help="where the table is written (default: the system's temporary folder)")
    options = parser.parse_args(arguments)
    sizes, rounds = ((2**24,), 3) if options.quick else (SIZES, 15)
    check_room(options.folder or Path(tempfile.gettempdir()), sizes[-1])
    found: dict[str, Any] = {"machine": machine(), "row values": WIDTH, "bar": BAR}
    print(f"{found['machine']['device']}, load {found['machine']['load_average']:.1f}; rows of {WIDTH} float16, ns a row\n")
    with tempfile.TemporaryDirectory(prefix="engram-", dir=options.folder) as folder:  # goes on an interrupt too
        found["sizes"] = [of_size(Path(folder), size, rounds) for size in sizes]
        path = Path(folder) / f"{sizes[-1]}.table"
        found["cold"] = cold(path, 3 if options.quick else 7)
        found["longest gap"] = longest_gap(path)
        print(f"a thread that spins beside one gather waits at most {found['longest gap']:.0%} of it in one go")
        found["hot rows"] = hot_rows(Path(folder), 4_000 if options.quick else 60_000)
    found["load after"] = machine()["load_average"]
    worst = max(size["ratio"] for size in found["sizes"])
    print(f"\ngather in memory takes at most {worst:.2f} times numpy.take (bar {BAR}: {'met' if worst <= BAR else 'NOT met'})")
    if not options.quick:
        name = slug(found["machine"]["device"])
        RESULTS.mkdir(exist_ok=True)
        record = RESULTS / f"engram-{name}.json"
        record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"record: {record.relative_to(RESULTS.parents[1])}")


def check_room(folder: Path, largest: int) -> None:
    """Raises InputError where disk or memory are too small for the tables."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give one on a disk with {size_text(2 * largest)} free")
    if (free := shutil.disk_usage(folder).free) < 2 * largest:
        raise InputError(f"the tables take {size_text(2 * largest)}, {folder} has {size_text(free)}; give another --folder")
    if (free_memory := available_bytes()) < 2 * largest:
        raise InputError(f"a table held in memory takes {size_text(2 * largest)}, {size_text(free_memory)} are free")


def in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, done in turn; the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def of_size(folder: Path, size: int, rounds: int) -> dict[str, Any]:
    """Uniform row numbers against a table of ``size`` bytes: numpy.take, gather in memory, gather from the mapped file."""
    path, rows = folder / f"{size}.table", size // (2 * WIDTH)
    EngramTable.create(path, rows, WIDTH).close()
    draws = [np.random.default_rng(seed).integers(rows, size=GATHERED) for seed in range(4)]
    out, turn = np.empty((GATHERED, WIDTH), np.float16), iter(range(10**9))
    with EngramTable.open(path, in_memory=True) as held, EngramTable.open(path) as mapped:
        plain = held.all_values()
        seconds = in_turn(
            {
                "take": lambda: np.take(plain, draws[next(turn) % 4], axis=0, out=out, mode="clip"),
                "in memory": lambda: held.gather(draws[next(turn) % 4], out),
                "mapped, warm": lambda: mapped.gather(draws[next(turn) % 4], out),
            },
            rounds,
        )
    ns = {name: 1e9 * value / GATHERED for name, value in seconds.items()}
    ratio = ns["in memory"] / ns["take"]
    print(
        f"{size / 2**20:>6.0f} MiB " + ", ".join(f"{name} {value:.0f}" for name, value in ns.items()) + f"; ratio {ratio:.2f}"
    )
    return {"bytes": size, "ns per row": ns, "ratio": ratio}


def cold(path: Path, rounds: int) -> dict[str, float] | str:
    """Microseconds per row read from the disk, with the advice that rows are read at random and without it."""
    tables = {advice: EngramTable.open(path, advice=advice) for advice in ("random", "none")}  # type: ignore[arg-type]
    try:
        out, taken = np.empty((COLD, WIDTH), np.float16), dict[str, list[float]](random=[], none=[])
        for seed in range(rounds):
            for advice, table in tables.items():
                for each in tables.values():
                    each.drop_pages()
                ids = np.random.default_rng(seed).integers(table.rows, size=COLD)
                start = time.perf_counter()
                table.gather(ids, out)
                taken[advice].append(time.perf_counter() - start)
    except WorkbenchError as error:  # only Linux can drop pages
        print(f"cold rows: not measured ({error})")
        return str(error)
    finally:
        for table in tables.values():
            table.close()
    found = {advice: 1e6 * statistics.median(times) / COLD for advice, times in taken.items()}
    print(f"cold, us a row: {found['random']:.1f} with random-access advice, {found['none']:.1f} without")
    return found


def longest_gap(path: Path) -> float:
    """The longest wait of a thread that only counts, over the length of a gather beside it: near 1 if that held the lock."""
    ticks: list[float] = []
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())

    with EngramTable.open(path) as table:
        ids = np.random.default_rng(0).integers(table.rows, size=20 * GATHERED)
        out = np.empty((len(ids), WIDTH), np.float16)
        table.gather(ids, out)
        thread = threading.Thread(target=spin)
        thread.start()
        time.sleep(0.05)
        start = time.perf_counter()
        table.gather(ids, out)
        end = time.perf_counter()
        stop.set()
        thread.join()
    during = np.array([start, *(t for t in ticks if start < t < end), end])
    return float(np.diff(during).max() / (end - start))


def hot_rows(folder: Path, tokens: int) -> list[dict[str, Any]]:
    """Held-out text through a shipped model's own hash, 512 tokens a call, into caches of several sizes."""
    model = wb.load("tiny-v4-engram", device="cpu")
    module = model.blocks[model.config.engram.layer_ids[0]].engram
    ids = model.canonical_ids(torch.tensor([encode(model, sample_text())[:tokens]]))
    found = []
    with EngramTable.create(folder / "hot.table", module.hash.rows, 256, "fp8") as table:
        for share in CACHE_SHARES:
            cache, lookback = HotRows(table, max(1, int(share * table.rows))), ids[:, :0]
            for piece in ids.split(512, dim=1):
                cache.gather(module.hash(piece, lookback, 0).numpy())
                lookback = torch.cat([lookback, piece], dim=1)[:, -(module.hash.orders - 1) :]
            counts = cache.counts
            less = 1 - counts.read_bytes / counts.plain_bytes
            found.append(
                {"cached share of rows": share, "cache bytes": cache.nbytes, "asked": counts.asked, "distinct": counts.distinct}
                | {"hit rate": counts.hit_rate, "spared rows": counts.saved, "read bytes": counts.read_bytes}
                | {"bytes without": counts.plain_bytes}
            )
            print(
                f"hot rows, {share:.0%} of {table.rows:,} cached, {ids.shape[1]:,} tokens of text: {counts.hit_rate:.0%} hits, "
                f"{counts.saved:.0%} of the rows asked for caused no read, {less:.0%} fewer bytes read"
            )
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
