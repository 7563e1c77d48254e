"""What attention pictures cost on the kernel's side: tiles, differences, thumbnails and strips from sparse records.

    workbench bench tiles                      2,048 and 65,536 tokens, and a strip over 262,144 compressed entries
    workbench bench tiles --quick              2,048 tokens and a short strip, few rounds, no record: does it run?

The traces are random numbers in the shape of tiny-v4's (4 heads, a window of 16, the 8 best entries of CSA, all of HCA), sparse
as a recorder leaves them. A tile is timed from records to PNG, whether of one recording or of one less another, a strip from
records to the chart as it is sent, and bytes are counted as they are sent: pictures as they are, charts as JSON. The record
goes to ``benchmarks/results/tiles-<device>.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from workbench.figures.attention import attention_tile, composite_tile, thumbnails
from workbench.figures.difference import difference_tile
from workbench.figures.query import strip_chart
from workbench.runtime import machine, slug
from workbench.trace import LayerTrace, Trace, entry_pooling, row_tokens
from workbench.widgets.attention import TILE_PIXELS, AttentionExplorer
from workbench.widgets.render import as_output

HEADS, WINDOW, KEPT, INDEX_HEADS, INDEX_WIDTH = 4, 16, 8, 8, 32
RATIOS = {"csa": 4, "hca": 128}
LENGTHS, STRIP_ENTRIES = (2_048, 65_536), 262_144
THUMBNAIL_HEADS = 31  # and their maximum: 32 pictures
RESULTS = Path(__file__).parent / "results"
# Bars: milliseconds and bytes.
TILE_MS, TILE_BYTES, THUMBNAILS_BYTES, STRIP_MS, STRIP_BYTES, MESSAGES = 60.0, 250_000, 160_000, 5.0, 10_000, 1


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="workbench bench tiles")
    parser.add_argument("--quick", action="store_true", help="short traces and few rounds; no record is written")
    options = parser.parse_args(arguments)
    lengths, entries, rounds = (LENGTHS[:1], 2**14, 3) if options.quick else (LENGTHS, STRIP_ENTRIES, 15)
    found: dict[str, Any] = {"machine": machine()}
    print(
        f"{found['machine']['device']}, load {found['machine']['load_average']:.1f}; kernel side, medians of {rounds} rounds\n"
    )
    found["tiles"] = [tile for length in lengths for tile in tiles(sparse_trace(length), rounds)]
    found["differences"] = [one for length in lengths for one in differences(length, rounds)]
    found["thumbnails"] = [
        of_thumbnails(sparse_trace(length, heads=THUMBNAIL_HEADS, kinds=("csa",)), rounds) for length in lengths
    ]
    found["strip"] = strip(entries, rounds)
    found["slider move"] = slider_moves(sparse_trace(lengths[-1]), 20 if options.quick else 60)
    found["load after"] = machine()["load_average"]
    print()
    found["bars"] = bars(found)
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        record = RESULTS / f"tiles-{slug(found['machine']['device'])}.json"
        record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"record: {record.relative_to(RESULTS.parents[1])}")


def sparse_trace(length: int, *, heads: int = HEADS, kinds: Sequence[str] = ("csa", "hca"), seed: int = 0) -> Trace:
    """A trace of ``length`` tokens in the form a recorder leaves, of random numbers that sum to about one a query and head."""
    rng = np.random.default_rng(seed)
    layers = tuple(_layer(rng, number, kind, length, heads) for number, kind in enumerate(kinds))
    words = ("the", " key", " of", " box", " is", " seven", ",", ".")
    return Trace(
        model="random records",
        what="no model; for measuring pictures",
        device="CPU",
        config={},
        token_ids=np.zeros(length, np.int32),
        token_texts=tuple(words[i] for i in rng.integers(0, len(words), length).tolist()),
        prompt_length=length,
        layers=layers,
        step_starts=np.arange(0, length, 256, dtype=np.int32),
    )


def _layer(rng: np.random.Generator, number: int, kind: str, length: int, heads: int) -> LayerTrace:
    ratio, t = RATIOS[kind], np.arange(length)
    closed = (t + 1) // ratio
    window = rng.random((length, heads, WINDOW), np.float32) ** 4 / WINDOW
    window *= (t[:, None] - WINDOW + 1 + np.arange(WINDOW) >= 0)[:, None, :]
    sinks = rng.random((length, heads), np.float32) / 4
    common = (number, kind, ratio, window.astype(np.float16), sinks.astype(np.float16))
    if kind == "hca":
        pooling = np.array([entry_pooling(int(i), row_tokens(length, ratio)) for i in t])
        columns = -(-closed // pooling)
        probs = rng.random((length, heads, int(columns.max())), np.float32) ** 4 / 8
        probs *= (np.arange(probs.shape[-1]) < columns[:, None])[:, None, :]
        return LayerTrace(*common, entry_probs=probs.astype(np.float16))
    chosen = (rng.random((length, KEPT)) * closed[:, None]).astype(np.int32)
    chosen = np.sort(chosen, axis=1)
    chosen[:, 1:][chosen[:, 1:] == chosen[:, :-1]] = -1  # each entry once
    chosen[closed == 0] = -1
    probs = np.where((chosen >= 0)[:, None, :], rng.random((length, heads, KEPT), np.float32) ** 2 / KEPT, 0)
    return LayerTrace(
        *common,
        selected=chosen,
        selected_scores=rng.random((length, KEPT), np.float32),
        selected_probs=probs.astype(np.float16),
        runner_up=np.where(closed > KEPT, 0, -1).astype(np.int32),
        runner_up_scores=np.zeros(length, np.float32),
        index_queries=rng.normal(size=(length, INDEX_HEADS, INDEX_WIDTH)).astype(np.float32),
        index_weights=rng.random((length, INDEX_HEADS), np.float32),
        index_keys=rng.normal(size=(length // ratio, INDEX_WIDTH)).astype(np.float32),
    )


def median_ms(call: Callable[[], Any], rounds: int) -> tuple[dict[str, float], Any]:
    """Median milliseconds passed and of processor time, the first call left out, and what the last one gave.

    On a busy machine the two differ, and what passed says more about the others.
    """
    taken: list[tuple[float, float]] = []
    out = None
    for _ in range(rounds + 1):
        start = time.perf_counter(), time.process_time()
        out = call()
        taken.append((1e3 * (time.perf_counter() - start[0]), 1e3 * (time.process_time() - start[1])))
    passed, worked = (round(statistics.median(times), 2) for times in zip(*taken[1:], strict=True))
    return {"ms": passed, "cpu ms": worked}, out


def tiles(trace: Trace, rounds: int) -> list[dict[str, Any]]:
    """One focus tile of every kind of view, as large as the explorer draws it."""
    found = []
    for record in trace.layers:
        for name, view in (("window and entries", attention_tile), ("one token axis", composite_tile)):
            for head in ("max", "mean", 0):
                ms, tile = median_ms(lambda v=view, n=record.layer, h=head: v(trace, n, h, max_pixels=TILE_PIXELS), rounds)
                what = {"tokens": trace.length, "layer": record.kind, "view": name, "head": head}
                found.append(what | ms | {"bytes": len(tile.png)})
                print(f"{trace.length:>7,} tokens, {record.kind}, {name}, head {head}: {_told(ms)}, {len(tile.png):,} bytes")
    return found


def differences(length: int, rounds: int) -> list[dict[str, Any]]:
    """The attention of a recording less that of another, every number of which differs; no bar."""
    runs, found = [sparse_trace(length, seed=seed) for seed in (0, 1)], []
    for record in runs[0].layers:
        for head in ("max", "mean", 0):
            ms, tile = median_ms(lambda n=record.layer, h=head: difference_tile(*runs, n, h), max(1, rounds // 3))
            found.append({"tokens": length, "layer": record.kind, "head": head, "bytes": len(tile.png)} | ms)
            print(
                f"{length:>7,} tokens, {record.kind}, one run less another, head {head}: {_told(ms)}, {len(tile.png):,} bytes"
            )
    return found


def of_thumbnails(trace: Trace, rounds: int) -> dict[str, Any]:
    ms, made = median_ms(lambda: thumbnails(trace, 0), max(1, rounds // 5))
    size = sum(len(png) for _, png in made)
    print(f"{trace.length:>7,} tokens, {len(made)} thumbnails: {_told(ms)}, {size:,} bytes")
    return {"tokens": trace.length, "pictures": len(made), "bytes": size} | ms


def strip(entries: int, rounds: int) -> dict[str, Any]:
    """The last query of a trace whose CSA layer has ``entries`` compressed entries."""
    ratio = RATIOS["csa"]
    trace = last_query(entries * ratio)
    ms, output = median_ms(lambda: as_output(strip_chart(trace, 0, trace.length - 1)), rounds)
    size = len(json.dumps(output["data"], separators=(",", ":")).encode())
    print(f"{entries:>7,} entries, one query's strip: {_told(ms)}, {size:,} bytes")
    return {"entries": entries, "tokens": entries * ratio, "bytes": size} | ms


def last_query(length: int) -> Trace:
    """A trace of ``length`` tokens with one row of numbers: arrays of a million rows are one row, repeated without memory."""
    small = sparse_trace(64, kinds=("csa",))
    record, rng = small.layers[0], np.random.default_rng(1)
    arrays = {
        name: np.broadcast_to(getattr(record, name)[-1:], (length, *getattr(record, name).shape[1:]))
        for name in ("window_probs", "sink_probs", "selected_scores", "selected_probs", "index_queries", "index_weights")
    }
    closed = length // record.ratio
    chosen = np.sort(rng.choice(closed, KEPT, replace=False)).astype(np.int32)
    keys = rng.normal(size=(closed, INDEX_WIDTH)).astype(np.float32)
    arrays |= {"selected": np.broadcast_to(chosen, (length, KEPT)), "index_keys": keys}
    arrays |= {"runner_up": np.broadcast_to(np.int32(7), length)}
    arrays |= {"runner_up_scores": np.broadcast_to(np.float32(0), length)}
    zeros = np.broadcast_to(np.int32(0), length)
    return replace(
        small, token_ids=zeros, token_texts=("x",) * length, prompt_length=length, layers=(replace(record, **arrays),)
    )


def slider_moves(trace: Trace, moves: int) -> dict[str, Any]:
    """Messages that choosing another query sends to each part of an explorer, and the time of all of it."""
    explorer = AttentionExplorer(trace)
    parts = {"map": explorer.map, "strip": explorer.strip, "text": explorer.text, "readout": explorer.readout}
    sent = dict.fromkeys(parts, 0)
    for name, widget in parts.items():
        widget.send_state = lambda key=None, name=name: sent.update({name: sent[name] + 1})  # type: ignore[method-assign]
    tokens = iter([(1 + move) * (trace.length - 1) // (moves + 1) for move in range(moves + 1)])
    ms, _ = median_ms(lambda: explorer.session.choose_token(next(tokens)), moves)
    explorer.close()
    each = {name: count / (moves + 1) for name, count in sent.items()}
    print(f"{trace.length:>7,} tokens, a query chosen: {_told(ms)} for all views; messages {each}")
    return {"tokens": trace.length, "moves": moves, "messages": each} | ms


def _told(ms: dict[str, float]) -> str:
    return f"{ms['ms']:.1f} ms ({ms['cpu ms']:.1f} ms of a core)"


def bars(found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [
        ("focus tile, bytes", max(x["bytes"] for x in found["tiles"]), TILE_BYTES),
        ("focus tile, ms", max(x["ms"] for x in found["tiles"]), TILE_MS),
        ("focus tile, ms of a core", max(x["cpu ms"] for x in found["tiles"]), TILE_MS),
        ("32 thumbnails, bytes", max(x["bytes"] for x in found["thumbnails"]), THUMBNAILS_BYTES),
        ("strip, bytes", found["strip"]["bytes"], STRIP_BYTES),
        ("strip, ms", found["strip"]["ms"], STRIP_MS),
        ("strip, ms of a core", found["strip"]["cpu ms"], STRIP_MS),
        ("messages to a view for one slider move", max(found["slider move"]["messages"].values()), MESSAGES),
    ]
    out = []
    for name, value, bar in rows:
        print(f"{name}: {value:,.4g} (bar {bar:,.4g}: {'met' if value <= bar else 'NOT met'})")
        out.append({"what": name, "value": value, "bar": bar, "met": bool(value <= bar)})
    return out


if __name__ == "__main__":
    main(sys.argv[1:])
