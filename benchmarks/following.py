"""Does the picture follow a live run, and what does that cost? Frames a second, and generation with views attached and without.

    workbench bench following                  tiny-v4, 512 tokens after a prompt of 512, eleven pairs of runs
    workbench bench following --quick          one short pair, no record: does it run?

Runs with an AttentionExplorer and a KVCacheGrowth attached and runs without take turns, first one kind and then the other, and
each pair gives a ratio of seconds from the first generated token to the last. What views send is turned into JSON, as a kernel
does, and counted; there is no page, so a slow browser is not part of it. A frame is a new picture of the map and a new text
while the run generates; charts, which take a page far longer, come less often and have no bar. The record goes to
``benchmarks/results/following-<device>.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comm

import workbench as wb
from benchmarks import _record
from workbench.live import LiveRun
from workbench.runtime import machine
from workbench.widgets.session import FRAME_S, SHARE

MODEL, PROMPT, TOKENS, PAIRS = "tiny-v4", 512, 512, 11
FRAMES_BAR, RATIO_BAR = 5.0, 1.15  # frames a second at least; seconds with views over seconds without, at most


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="workbench bench following")
    parser.add_argument("--quick", action="store_true", help="one short pair, and no record is written")
    options = parser.parse_args(arguments)
    prompt, tokens, pairs = (64, 48, 1) if options.quick else (PROMPT, TOKENS, PAIRS)
    found = _record.begin("following", model=MODEL, prompt=prompt, tokens=tokens, frame_s=FRAME_S, share=SHARE)
    print(f"{found['machine']['device']}, load {found['machine']['load_average']:.1f}")
    model = wb.load(MODEL, device="cpu")
    ids = (model.tokenizer.encode(wb.sample_text()).ids * (1 + prompt // 512))[:prompt]
    generate(model, ids, min(tokens, 32), views=True)  # what is made once
    found["pairs"] = []
    for number in range(pairs):
        order = (False, True) if number % 2 else (True, False)
        runs = {views: generate(model, ids, tokens, views=views) for views in order}
        pair = {"plain s": runs[False]["s"], "followed s": runs[True]["s"], "frames": runs[True]["frames"]}
        pair |= {"ratio": round(pair["followed s"] / pair["plain s"], 4), "load": machine()["load_average"]}
        pair["frames a second"] = {name: round(count / pair["followed s"], 2) for name, count in pair["frames"].items()}
        found["pairs"].append(pair)
        rates = ", ".join(f"{name} {rate:.1f}" for name, rate in pair["frames a second"].items())
        print(
            f"{tokens} tokens: {pair['plain s']:.2f} s, followed {pair['followed s']:.2f} s (ratio {pair['ratio']:.3f}); "
            f"frames a second: {rates}; load {pair['load']:.1f}",
            flush=True,
        )
    found["bars"] = bars(found["pairs"])
    if not options.quick:
        _record.store(found)


def generate(model: Any, ids: list[int], tokens: int, *, views: bool) -> dict[str, Any]:
    """Seconds from the first new token to the last, and the pictures sent between them."""
    times: list[float] = []
    done = threading.Event()

    def note(event: Any) -> None:
        if event.kind == "token":
            times.append(time.perf_counter())
        elif event.state in ("done", "stopped", "failed"):
            done.set()

    with counted_messages() as sent:
        run = wb.run(model, ids, max_new_tokens=tokens)
        run.on_event(note)
        followed = _views(run) if views else {}
        if not run.wait(600) or run.state != "done":
            raise SystemExit(f"the run ended as {run.state}: {run.error}")
        within = {
            name: sum(times[0] <= at <= times[-1] for at in sent.get(part.model_id, ())) for name, part in followed.items()
        }
        _until_painted(run)
    return {"s": round(times[-1] - times[0], 4), "frames": within}


def _views(run: LiveRun) -> dict[str, Any]:
    """The parts of an explorer and a chart that show something new with each snapshot."""
    explorer, growth = wb.AttentionExplorer(run), wb.KVCacheGrowth(run)
    run.followers = explorer, growth  # type: ignore[attr-defined]  # kept while the run is
    return {"map": explorer.map, "text": explorer.text, "KV chart": growth.view}


def _until_painted(run: LiveRun) -> None:
    """Let the painter draw the end, so that it does not draw into the next run."""
    for explorer, *_ in filter(None, [getattr(run, "followers", None)]):
        painter = explorer.session._painter
        if painter is not None:
            painter.join(60)


PICTURES = {"png", "html", "outputs"}


@contextmanager
def counted_messages() -> Iterator[dict[str, list[float]]]:
    """Model id -> when a new picture of it was sent. Messages are made as a kernel makes them, and then dropped."""
    sent: dict[str, list[float]] = {}

    class Counting(comm.base_comm.BaseComm):
        def publish_msg(self, msg_type: str, data: Any = None, metadata: Any = None, buffers: Any = None, **keys: Any) -> None:
            json.dumps({"content": data, "metadata": metadata, **keys}, default=str).encode()
            inside = data or {}
            paths = {str(path[0]) for path in inside.get("buffer_paths", ()) if path}
            if msg_type == "comm_msg" and PICTURES & (set(inside.get("state", ())) | paths):
                sent.setdefault(self.comm_id, []).append(time.perf_counter())

    before = comm.create_comm
    comm.create_comm = Counting
    try:
        yield sent
    finally:
        comm.create_comm = before


def bars(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the pairs; of the frames, the lower of the map's and the text's."""
    frames = statistics.median(min(pair["frames a second"][name] for name in ("map", "text")) for pair in pairs)
    ratio = statistics.median(pair["ratio"] for pair in pairs)
    rows = [
        ("frames a second", frames, FRAMES_BAR, frames >= FRAMES_BAR),
        ("seconds with views over seconds without", ratio, RATIO_BAR, ratio <= RATIO_BAR),
    ]
    out = []
    for name, value, bar, met in rows:
        print(f"{name}: {value:.3g} (bar {bar:g}: {'met' if met else 'NOT met'})")
        out.append({"what": name, "value": value, "bar": bar, "met": bool(met)})
    return out


if __name__ == "__main__":
    main(sys.argv[1:])
