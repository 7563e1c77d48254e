"""Chrome-trace JSON, which Perfetto and chrome://tracing open: our timelines out and back in, and other profilers' traces in.

`save` writes a Timeline or a Trace; `load` reads such a file back as a Timeline, and what torch.profiler exports as a Profile.
Every number in a file is in microseconds. (reference/engram-and-overlap.md, section 4.5)
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any, get_args

from workbench.errors import InputError
from workbench.profile import Profile, profile_of
from workbench.trace import Origin, Span, Timeline, Trace, stored_origin

FORMAT, VERSION = "workbench-timeline", 1
MAX_BYTES = 2**28  # of JSON; reading takes several times as much memory
MAX_STEP = 10**6
GZIP_MAGIC = b"\x1f\x8b"
# One process per origin, so that measured and modelled spans are never on one track.
PROCESSES: dict[Origin, int] = {"measured": 1, "recorded": 2, "modelled": 3}
INSIDE = 1e-3  # arrows end this share of the shorter span within both, where Perfetto looks for slices to tie them to


def save(source: Timeline | Trace, path: str | Path) -> Path:
    """Write ``source`` as Chrome-trace JSON and return the path; a name that ends in .gz is compressed.

    A Trace also gets its KV cache as a counter, in bytes after each step.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file, such as timeline.json")
    data = dumps(source)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def dumps(source: Timeline | Trace) -> bytes:
    """What ``save`` writes."""
    return json.dumps(document(source), ensure_ascii=False, allow_nan=False).encode()


def document(source: Timeline | Trace) -> dict[str, Any]:
    """Spans as complete events, one track per lane and origin; dependencies as arrows; names and order of the tracks."""
    timeline = source.timeline if isinstance(source, Trace) else source
    if not isinstance(timeline, Timeline):
        raise InputError(f"a Timeline or a Trace can be saved as a Chrome trace, got {type(source).__name__}")
    places = _places(timeline)
    tracks: dict[tuple[Origin, str, int], tuple[int, int]] = {}  # -> process and thread
    for place in places:
        tracks.setdefault(place, (PROCESSES[place[0]], len(tracks) + 1))
    at = {id(span): tracks[place] for span, place in zip(timeline.spans, places, strict=True)}
    events: list[dict[str, Any]] = []
    for origin, process in PROCESSES.items():
        if any(place[0] == origin for place in tracks):
            events += _named("process", process, 0, f"{origin} on {timeline.device}" if timeline.device else origin)
    for (origin, lane, row), (process, line) in tracks.items():
        events += _named("thread", process, line, f"{lane}{f' {row + 1}' if row else ''} ({origin})")
    for span, (origin, _, _) in zip(timeline.spans, places, strict=True):
        process, line = at[id(span)]
        about = {"lane": span.lane, "step": span.step, "source": origin, "after": list(span.after)}
        times = {"ts": 1e6 * span.start_s, "dur": 1e6 * (span.end_s - span.start_s)}
        events.append({"ph": "X", "name": span.name, "cat": span.lane, **times, "pid": process, "tid": line, "args": about})
    for number, (cause, span) in enumerate(timeline.dependencies()):
        lengths = [s.end_s - s.start_s for s in (cause, span) if s.end_s > s.start_s]
        inside = INSIDE * min(lengths, default=0.0)
        leaves = max(cause.start_s, cause.end_s - inside)
        arrives = min(max(span.start_s, leaves), max(span.start_s, span.end_s - inside))  # a stall ends with its cause
        for end, when, of in (({"ph": "s"}, leaves, cause), ({"ph": "f", "bp": "e"}, arrives, span)):
            process, line = at[id(of)]
            arrow = {"id": number, "name": "waits for", "cat": "dependency", "ts": 1e6 * when, "pid": process, "tid": line}
            events.append({**end, **arrow})
    if isinstance(source, Trace):
        events += _cache_counter(source)
    own = {"format": FORMAT, "version": VERSION, "origin": timeline.origin, "device": timeline.device, "note": timeline.note}
    return {"displayTimeUnit": "ms", "traceEvents": events, "otherData": own}


def load(path: str | Path) -> Timeline | Profile:
    """Read a .json or .json.gz file; see ``loads``. A missing file is an InputError, too."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file {str(path)!r}: give a Chrome trace, as torch.profiler's export_chrome_trace writes")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(too_large(path.name))
    return loads(path.read_bytes(), path.name)


def loads(data: bytes, name: str = "trace.json") -> Timeline | Profile:
    """The Timeline that ``dumps`` wrote, its measurements now "recorded", or a profiler's trace as a Profile.

    Plain or compressed JSON of at most ``MAX_BYTES``. Whatever is wrong with it is one InputError that says where.
    """
    if data[:2] == GZIP_MAGIC:
        try:
            with gzip.open(io.BytesIO(data)) as packed:
                data = packed.read(MAX_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{name} is damaged ({error}); export or copy it again") from None
    if len(data) > MAX_BYTES:
        raise InputError(too_large(name))
    try:
        read = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name} is no JSON ({reason}); if it was cut short, export it again") from None
    found = read if isinstance(read, dict) else {"traceEvents": read}
    events = found.get("traceEvents")
    if not isinstance(events, list):
        what = f"an object with {', '.join(map(repr, list(found)[:4])) or 'nothing'}" if read is found else f"{read!r:.30}"
        raise InputError(f"{name} is no Chrome trace: expected an object with a list 'traceEvents', got {what}")
    about = found.get("otherData")
    if isinstance(about, dict) and about.get("format") == FORMAT:
        return _own(about, events, name)
    return profile_of(found, events, name)


def too_large(name: str) -> str:
    return f"{name} holds more than {MAX_BYTES / 2**20:.0f} MiB of JSON; profile fewer steps (torch.profiler.schedule)"


def _places(timeline: Timeline) -> list[tuple[Origin, str, int]]:
    """Origin, lane and row of each span: those that overlap, neither holding the other, are misdrawn unless in rows apart."""
    places: list[tuple[Origin, str, int]] = [(o, s.lane, 0) for o, s in zip(timeline.origins(), timeline.spans, strict=True)]
    under_way: dict[tuple[Origin, str], list[list[float]]] = defaultdict(list)  # of each row, ends of the slices begun
    for i in sorted(range(len(places)), key=lambda i: (timeline.spans[i].start_s, -timeline.spans[i].end_s)):
        span, (origin, lane, _) = timeline.spans[i], places[i]
        rows = under_way[origin, lane]
        for ends in rows:
            while ends and ends[-1] <= span.start_s:
                ends.pop()
        row = next((r for r, ends in enumerate(rows) if not ends or span.end_s <= ends[-1]), len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(span.end_s)
        places[i] = (origin, lane, row)
    return places


def _named(what: str, process: int, line: int, name: str) -> list[dict[str, Any]]:
    """A process or thread's name and its place in the order."""
    where = {"ph": "M", "pid": process, "tid": line}
    order = process if what == "process" else line
    return [
        {**where, "name": f"{what}_name", "args": {"name": name}},
        {**where, "name": f"{what}_sort_index", "args": {"sort_index": order}},
    ]


def _cache_counter(trace: Trace) -> list[dict[str, Any]]:
    """Bytes of the KV cache by part, when each step's last span ends."""
    ends: dict[int, float] = {}
    for span in trace.timeline.spans:
        ends[span.step] = max(ends.get(span.step, 0.0), span.end_s)
    return [
        {
            "ph": "C", "name": "KV cache (bytes)", "pid": PROCESSES[trace.timeline.origin], "tid": 0, "ts": 1e6 * end,
            "args": {part: int(held[step]) for part, held in trace.cache_bytes.items()},
        }
        for step, end in sorted(ends.items())
        if trace.cache_bytes and step < trace.steps
    ]  # fmt: skip


def _own(about: dict[str, Any], events: list[Any], name: str) -> Timeline:
    """Back from what ``document`` wrote; anything it would not have written is an InputError."""
    if about.get("version") != VERSION:
        raise InputError(
            f"{name} is a {FORMAT} of version {about.get('version')!r}, this workbench reads {VERSION}; export it again"
        )
    spans = []
    for i, event in enumerate(events):
        if not isinstance(event, dict):
            raise InputError(f"{name}: event {i} is {event!r:.40}, not an object with ph, name and ts")
        if event.get("ph") == "X":
            try:
                spans.append(_span(event))
            except (InputError, ValueError, KeyError, TypeError) as error:
                raise InputError(f"{name}: event {i} is no span of a {FORMAT} ({error})") from None
    origin, device, note = about.get("origin"), about.get("device"), about.get("note")
    if origin not in ("measured", "modelled", "recorded") or not isinstance(device, str) or not isinstance(note, str):
        raise InputError(f"{name} does not say where its spans come from: otherData needs origin, device and note")
    return Timeline(stored_origin(origin), tuple(spans), device, note)


def _span(event: dict[str, Any]) -> Span:
    about, label = event["args"], event["name"]
    lane, step, origin, after = about["lane"], about["step"], about["source"], about["after"]
    texts = (lane, label, *(after if isinstance(after, list) else [None]))
    if not all(isinstance(text, str) for text in texts) or type(step) is not int or not 0 <= step <= MAX_STEP:
        raise InputError(f"lane {lane!r:.40}, name {label!r:.40}, step {step!r:.40}, after {after!r:.40}")
    if origin not in get_args(Origin):
        raise InputError(f"source {origin!r:.40}")
    start_us, length_us = event["ts"], event["dur"]
    if not all(isinstance(us, int | float) and not isinstance(us, bool) for us in (start_us, length_us)):
        raise InputError(f"ts {start_us!r:.40}, dur {length_us!r:.40}")
    if not length_us < 1e17:
        raise InputError(f"dur {length_us!r:.40}")
    return Span(lane, label, step, start_us / 1e6, (start_us + length_us) / 1e6, stored_origin(origin), tuple(after))
