"""What a row of an Engram table costs: gathered in memory, from the mapped file, from the disk, and through a hot-row cache.

    workbench bench engram                     two tables of 1 GiB, written for this and removed again
    workbench bench engram --quick             16 MiB, few rounds, no record: does it run?
    workbench bench engram --folder DIR        where the tables are written; one in memory (tmpfs) has no cold rows

Rows of 80 float16 values as in the reference's measurements; the cache reads rows of V4.1's size, 256 values in 264 bytes, by
the n-grams of held-out text. Everything that is compared is done in turn, round after round; medians and their ratio are shown,
and the 10th percentiles, which other work on the machine disturbs less.
"Cold" rows were dropped from the system's memory before each call; what the disk keeps in a memory of its own is out of reach.
The record goes to ``benchmarks/results/engram-<device>.json``.
(reference/engram-and-overlap.md, sections 4.3, 5.1 and 5.2)
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import workbench as wb
from benchmarks import _record
from workbench.errors import InputError, WorkbenchError
from workbench.live import encode
from workbench.memory.hot_rows import HotRows
from workbench.memory.row_formats import row_bytes
from workbench.memory.table import EngramTable
from workbench.memory.table_file import PAGE
from workbench.model.engram import NgramHash
from workbench.needle import sample_text
from workbench.runtime import available_bytes, size_text

WIDTH = 80  # values of a row
SIZES = (2**24, 2**26, 2**28, 2**30)
GATHERED, COLD = 60_000, 500  # rows in one call
BAR = 1.1  # gather / numpy.take
HEAD_ROWS = 170_000  # of each of the 24 tables that one token reads, as in V4.1: 4.1 million rows, 1 GiB as FP8
CAPACITIES = (4_000, 16_000, 64_000, 256_000)  # rows that a cache may hold
TOKENS = 256  # of text in a call


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="workbench bench engram")
    parser.add_argument("--quick", action="store_true", help="a small table and few rounds; no record is written")
    parser.add_argument("--folder", type=Path, help="where the table is written (default: the system's temporary folder)")
    options = parser.parse_args(arguments)
    quick = options.quick
    sizes, rounds = ((2**24,), 3) if quick else (SIZES, 40)
    text = text_rows(*((700, 20_000) if quick else (HEAD_ROWS, 10**9)))
    folder = options.folder or Path(tempfile.gettempdir())
    check_room(folder, sizes, text[0] * row_bytes("fp8", 256))
    found = _record.begin("engram", **{"row values": WIDTH, "bar": BAR})
    print(f"{found['machine']['device']}, load {found['machine']['load_average']}")
    print(f"rows of {WIDTH} float16, ns a row: median (10th percentile)\n")
    with temporary(folder) as place:
        found["sizes"] = [of_size(place, size, rounds) for size in sizes]
        path = place / f"{sizes[-1]}.table"
        found["cold"] = cold(path, 3 if quick else 7)
        found["longest gap"] = lock_gaps(path, 3 if quick else 9)
        found["hot rows"] = hot_rows(place, *text, *(((500, 2000), 2) if quick else (CAPACITIES, 16)))
    medians, tenths = (max(size[key] for size in found["sizes"]) for key in ("ratio", "p10 ratio"))
    met = "met" if medians <= BAR else "NOT met; on a busy machine the 10th percentile tells more"
    print(f"\ngather in memory takes at most {medians:.2f} ({tenths:.2f}) times numpy.take (bar {BAR}: {met})")
    if not quick:
        _record.store(found)


@contextmanager
def temporary(folder: Path) -> Iterator[Path]:
    """A folder in ``folder`` that is gone afterwards, also after an interrupt."""
    try:
        made = tempfile.TemporaryDirectory(prefix="engram-", dir=folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written in ({error.strerror}); give another --folder") from None
    with made as place:
        yield Path(place)


def check_room(folder: Path, sizes: Sequence[int], hot_bytes: int) -> None:
    """Raises InputError where disk or memory are too small for the tables."""
    disk = sum(sizes) + hot_bytes + 2**26
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give one on a disk with {size_text(disk)} free")
    if (free := shutil.disk_usage(folder).free) < disk:
        raise InputError(f"the tables take {size_text(disk)}, {folder} has {size_text(free)}; give another --folder")
    memory = 2 * sizes[-1] + hot_bytes  # one table held, and both kept by the system, or "warm" would not be
    if (left := available_bytes()) < memory:
        raise InputError(f"the tables take {size_text(memory)} of memory, {size_text(left)} are free; try --quick")


def in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, done in turn; the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_:
                taken[name].append(time.perf_counter() - start)
    return taken


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
    ns = {name: 1e9 * statistics.median(times) / GATHERED for name, times in seconds.items()}
    quiet = {name: 1e9 * float(np.percentile(times, 10)) / GATHERED for name, times in seconds.items()}
    ratio, quiet_ratio = ns["in memory"] / ns["take"], quiet["in memory"] / quiet["take"]
    told = ", ".join(f"{name} {value:.0f} ({quiet[name]:.0f})" for name, value in ns.items())
    print(f"{size / 2**20:>6.0f} MiB {told}; ratio {ratio:.2f} ({quiet_ratio:.2f})")
    return {"bytes": size, "ns per row": ns, "p10 ns per row": quiet, "ratio": ratio, "p10 ratio": quiet_ratio}


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


def lock_gaps(path: Path, rounds: int) -> dict[str, float]:
    """The longest wait of a thread that only counts, over the length of a call beside it: near 1 if that holds the lock."""
    draw, numbers = np.random.default_rng(0), np.random.default_rng(0).random(GATHERED).tolist()
    with EngramTable.open(path) as table:
        out = np.empty((20 * GATHERED, WIDTH), np.float16)
        calls: dict[str, Callable[[np.ndarray], Any]] = {
            "gather": lambda ids: table.gather(ids, out),
            "sorted(list), which holds it": lambda ids: sorted(numbers),
        }
        shares: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                shares[name].append(longest_gap(call, draw.integers(table.rows, size=len(out))))
    found = {name: statistics.median(gaps) for name, gaps in shares.items()}
    print("a thread that spins beside one call waits at most, of it: " + ", ".join(f"{n} {g:.0%}" for n, g in found.items()))
    return found


def longest_gap(call: Callable[[np.ndarray], Any], ids: np.ndarray) -> float:
    ticks: list[float] = []
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        time.sleep(0.05)
        start = time.perf_counter()
        call(ids)
        end = time.perf_counter()
    finally:  # an interrupt too, or the thread would never end
        stop.set()
        thread.join()
    during = np.array([start, *(t for t in ticks if start < t < end), end])
    return float(np.diff(during).max() / (end - start))


def text_rows(head_rows: int, characters: int) -> tuple[int, np.ndarray]:
    """Rows of a table whose every n-gram length and head has about ``head_rows``, and those [tokens, 24] held-out text reads.

    The shipped V4.1 toy's tokens and hash, with V4.1's 8 heads and the larger table.
    """
    model = wb.load("tiny-v41", device="cpu")
    engram = replace(model.config.engram, vocab_size=head_rows, n_heads=8)
    hashed = NgramHash(engram, engram.layer_ids[0])
    ids = model.canonical_ids(torch.tensor([encode(model, sample_text()[:characters])]))
    return hashed.rows, hashed(ids, ids[:, :0], int(model.engram_canonical_ids[engram.pad_token_id]))[0].numpy()


def hot_rows(folder: Path, rows: int, asked: np.ndarray, capacities: Sequence[int], cold_calls: int) -> dict[str, Any]:
    """Held-out text, ``TOKENS`` a call, from a table of ``rows`` rows really written, without a cache and through several.

    Bytes are the pages that hold a call's different rows, counted. To see that a disk is read like that, the last
    ``cold_calls`` calls run with all pages dropped before each: seconds, and the bytes this process had read from disks.
    """
    calls = [asked[first : first + TOKENS] for first in range(0, len(asked), TOKENS)]
    with EngramTable.create(folder / "hot.table", rows, 256, "fp8") as table:
        size = table.path.stat().st_size
        print(f"\n{len(asked):,} tokens of text, {TOKENS} a call, on {rows:,} rows of 264 bytes ({size / 2**30:.2f} GiB)")
        caches = {capacity: HotRows(table, capacity) for capacity in capacities}
        readers: dict[int, EngramTable | HotRows] = {0: table, **caches}
        warm = {capacity: 0.0 for capacity in readers}
        for ids in calls[:-cold_calls]:
            for capacity, reader in readers.items():
                start = time.perf_counter()
                reader.gather(ids)
                warm[capacity] += time.perf_counter() - start
        cold = cold_text(table, readers, calls[-cold_calls:])
    per_row = 1e9 / sum(ids.size for ids in calls[:-cold_calls])
    found: dict[str, Any] = {"bytes": size, "rows": rows, "tokens": len(asked), "tokens a call": TOKENS, "asked": asked.size}
    found |= {"share of lookups": shares_of_lookups(asked), "ns a row, warm, no cache": per_row * warm[0], "cold": cold}
    found["caches"] = [
        {"capacity rows": cache.capacity_rows, "cache bytes": cache.nbytes, **asdict(cache.counts)}
        | {"hit rate": cache.counts.hit_rate, "saved": cache.counts.saved, "ns a row, warm": per_row * warm[capacity]}
        | {"bytes read, cache / none": cache.counts.read_bytes / cache.counts.plain_bytes}
        for capacity, cache in caches.items()
    ]
    report_hot(found)
    return found


def shares_of_lookups(asked: np.ndarray) -> dict[str, float]:
    """How uneven text is: of the rows it reads at all, the most wanted 1 % and 10 %, and the share of all lookups they take."""
    times = np.sort(np.unique(asked, return_counts=True)[1])[::-1]
    return {f"{share:.0%}": float(times[: max(1, int(share * len(times)))].sum() / asked.size) for share in (0.01, 0.1)}


def cold_text(
    table: EngramTable, readers: dict[int, EngramTable | HotRows], calls: Sequence[np.ndarray]
) -> dict[str, Any] | str:
    """Capacity -> seconds, bytes read from the disk, bytes counted, of calls whose pages were all dropped before."""
    before = {capacity: reader.counts.read_bytes for capacity, reader in readers.items() if isinstance(reader, HotRows)}
    found: dict[str, Any] = {str(capacity): {"s": 0.0, "disk bytes": 0} for capacity in readers}
    try:
        for ids in calls:
            for capacity, reader in readers.items():
                table.drop_pages()
                held, start = bytes_from_disk(), time.perf_counter()
                reader.gather(ids)
                found[str(capacity)]["s"] += time.perf_counter() - start
                found[str(capacity)]["disk bytes"] += bytes_from_disk() - held
    except WorkbenchError as error:  # only Linux can drop pages
        print(f"reading cold: not measured ({error})")
        return str(error)
    found["0"]["counted bytes"] = sum(table.pages(np.unique(ids)) * PAGE for ids in calls)
    for capacity, read in before.items():
        reader = readers[capacity]
        assert isinstance(reader, HotRows)
        found[str(capacity)]["counted bytes"] = reader.counts.read_bytes - read
    return found | {"calls": len(calls)}


def bytes_from_disk() -> int:
    """What this process has had read from disks so far; 0 where the system does not tell."""
    try:
        return int(re.findall(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)[0])
    except (OSError, IndexError):
        return 0


def report_hot(found: dict[str, Any]) -> None:
    first = found["caches"][0]
    different = f"{first['distinct'] / found['asked']:.0%} of them different within their call"
    taken = ", ".join(f"the most wanted {share} take {part:.0%}" for share, part in found["share of lookups"].items())
    print(f"{found['asked']:,} rows asked for, {different}; of the rows read at all, {taken}")
    for cache in found["caches"]:
        ratio = cache["bytes read, cache / none"]
        costs = f"warm {cache['ns a row, warm']:.0f} ns a row, {found['ns a row, warm, no cache']:.0f} without"
        print(
            f"{cache['capacity rows']:>9,} rows held ({size_text(cache['cache bytes'])}): {cache['hit rate']:.0%} hits, "
            f"{ratio:.2f} of the bytes read ({1 - ratio:.0%} fewer bytes read); {costs}"
        )
    print(f"bar, fewer bytes read: {'met' if all(c['bytes read, cache / none'] < 1 for c in found['caches']) else 'NOT met'}")
    if isinstance(cold := found["cold"], dict):
        for name, read in cold.items():
            if isinstance(read, dict):
                held = f"{int(name):,} rows held" if int(name) else "no cache"
                disk = f"{size_text(read['disk bytes'])} from the disk, {size_text(read['counted bytes'])} counted"
                print(f"cold, the last {cold['calls']} calls, {held}: {read['s']:.2f} s, {disk}")


if __name__ == "__main__":
    main(sys.argv[1:])
