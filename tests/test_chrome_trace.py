"""Our timelines as Chrome-trace JSON: what Perfetto needs is there, and a file read back is the timeline again."""

import gzip
import json
import random
from dataclasses import replace

import pytest

from tests.synthetic import synthetic_trace
from workbench import chrome_trace
from workbench.cost.fetch import Setting, engram_models, modelled
from workbench.devices import devices
from workbench.errors import InputError
from workbench.trace import Span, Timeline

TRACE = synthetic_trace(47, prompt_length=31, prefill_chunk=13)
MODELLED = modelled(
    Setting(model=engram_models["engram-27b"], device=devices["h100"], tokens=4, phase="decode", layers=(1, 2), cards=8)
).timeline
MIXED = Timeline("measured", (*TRACE.timeline.spans[:40], *MODELLED.spans), "a <CPU>", "both, side by side")
LANES = ("compute", "lookup", "transfer", "stall", "stream 7")


def random_timeline(seed):
    draw = random.Random(seed)
    spans = []
    for i in range(draw.randrange(1, 60)):
        start = draw.uniform(0, 1e4) if draw.random() < 0.2 else draw.uniform(0, 1e-3)
        length = draw.choice([0.0, draw.uniform(0, 1e-9), draw.uniform(0, 1e-4), draw.uniform(0, 10)])
        after = tuple(draw.sample([f"span {j}" for j in range(i)] or ["nobody"], draw.randrange(2)))
        origin = draw.choice(["measured", "modelled", "recorded"])
        spans.append(Span(draw.choice(LANES), f"span {i}", draw.randrange(5), start, start + length, origin, after))
    return Timeline(draw.choice(["measured", "modelled"]), tuple(spans), 'a "device" µ', "ein\nHinweis")


def as_read(timeline):
    """What a timeline is called once it comes from a file: nothing was measured now."""

    def origin(was):
        return "recorded" if was == "measured" else was

    spans = tuple(replace(s, origin=origin(o)) for s, o in zip(timeline.spans, timeline.origins(), strict=True))
    return replace(timeline, origin=origin(timeline.origin), spans=spans)


def assert_equal(got, expected):
    assert (got.origin, got.device, got.note) == (expected.origin, expected.device, expected.note)
    assert len(got.spans) == len(expected.spans)
    for a, b in zip(got.spans, expected.spans, strict=True):
        assert a.start_s == pytest.approx(b.start_s, abs=1e-9, rel=0) and a.end_s == pytest.approx(b.end_s, abs=1e-9, rel=0)
        assert replace(a, start_s=b.start_s, end_s=b.end_s) == b


@pytest.mark.parametrize("timeline", [TRACE.timeline, MODELLED, MIXED, *map(random_timeline, range(12))])
def test_a_timeline_read_back_is_equal_to_within_a_nanosecond(timeline):
    assert_equal(chrome_trace.loads(chrome_trace.dumps(timeline)), as_read(timeline))


@pytest.mark.parametrize("name", ["timeline.json", "timeline.json.gz"])
def test_files_come_back_plain_and_compressed(tmp_path, name):
    path = chrome_trace.save(MODELLED, tmp_path / name)
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")
    assert_equal(chrome_trace.load(path), as_read(MODELLED))
    with pytest.raises(InputError, match="is a folder"):
        chrome_trace.save(MODELLED, tmp_path)


def events_of(source, kind):
    return [e for e in json.loads(chrome_trace.dumps(source))["traceEvents"] if e["ph"] == kind]


def track(event):
    return event["pid"], event["tid"]


def test_times_are_microseconds_and_sources_are_said():
    timeline = Timeline("measured", (Span("compute", "layer 0", 0, 2e-3, 5e-3),), "a CPU")
    (event,) = events_of(timeline, "X")
    assert (event["ts"], event["dur"], event["name"], event["args"]["source"]) == (2000.0, 3000.0, "layer 0", "measured")
    assert {"cat", "pid", "tid"} <= event.keys() and json.loads(chrome_trace.dumps(timeline))["displayTimeUnit"] == "ms"


@pytest.mark.parametrize("timeline", [MIXED, *map(random_timeline, range(12))])
def test_measured_and_modelled_are_never_on_one_track_nor_in_one_process(timeline):
    by_process = {}
    for event in events_of(timeline, "X"):
        by_process.setdefault(event["pid"], set()).add(event["args"]["source"])
    assert by_process and all(len(sources) == 1 for sources in by_process.values())
    names = {track(e): e["args"]["name"] for e in events_of(timeline, "M") if e["name"] == "thread_name"}
    assert all(names[track(e)].endswith(f"({e['args']['source']})") for e in events_of(timeline, "X"))
    ordered = {track(e) for e in events_of(timeline, "M") if e["name"] == "thread_sort_index"}
    assert ordered == names.keys() == {track(e) for e in events_of(timeline, "X")}
    assert {e["pid"] for e in events_of(timeline, "M") if e["name"] == "process_name"} == set(by_process)


@pytest.mark.parametrize("timeline", [MIXED, *map(random_timeline, range(30))])
def test_slices_of_one_track_nest(timeline):
    tracks = {}
    for event in events_of(timeline, "X"):
        tracks.setdefault(track(event), []).append((event["ts"], event["ts"] + event["dur"]))
    for slices in tracks.values():
        for i, (a0, a1) in enumerate(slices):
            for b0, b1 in slices[i + 1 :]:
                apart = a1 <= b0 + 1e-3 or b1 <= a0 + 1e-3
                nested = (a0 <= b0 and b1 <= a1 + 1e-3) or (b0 <= a0 and a1 <= b1 + 1e-3)
                assert apart or nested


def test_arrows_start_and_end_inside_their_slices_and_run_forwards():
    starts, ends = events_of(MODELLED, "s"), events_of(MODELLED, "f")
    assert len(starts) == len(ends) == len(MODELLED.dependencies()) > 6 and all(e["bp"] == "e" for e in ends)
    slices = events_of(MODELLED, "X")
    names = {}
    for event in (*starts, *ends):
        around = [s for s in slices if track(s) == track(event) and s["ts"] <= event["ts"] <= s["ts"] + s["dur"]]
        assert around, event
        names.setdefault(event["id"], []).append(around[-1]["name"])
    assert ["token ids", "layer 1 hash"] in names.values() and ["layer 1 copy", "layer 1"] in names.values()
    by_id = {e["id"]: e["ts"] for e in starts}
    assert all(e["ts"] >= by_id[e["id"]] for e in ends)


def test_a_name_nobody_has_gives_no_arrow_and_a_step_keeps_to_itself():
    gather = [Span("lookup", "gather", step, 1.0 * step, step + 0.5) for step in (0, 1)]
    layers = [Span("compute", "layer", step, step + 0.5, step + 0.9, after=("gather", "absent")) for step in (0, 1, 2)]
    pairs = Timeline("measured", (*gather, *layers)).dependencies()
    assert [(cause.step, span.step) for cause, span in pairs] == [(0, 0), (1, 1)]  # none of another step's gathers for step 2
    sampled = Span("compute", "sampling of step 0", 0, 0.9, 1.0)
    hashed = Span("lookup", "hash", 1, 1.0, 1.1, after=("sampling of step 0",))
    assert Timeline("measured", (sampled, hashed)).dependencies() == [(sampled, hashed)]


def test_a_trace_carries_its_cache_as_a_counter():
    counters = events_of(TRACE, "C")
    assert [c["args"]["compressed"] for c in counters] == TRACE.cache_bytes["compressed"].tolist()
    assert [c["ts"] for c in counters] == sorted(c["ts"] for c in counters)
    with pytest.raises(InputError, match="got str"):
        chrome_trace.dumps("a timeline")


def altered(change):
    trace = json.loads(chrome_trace.dumps(MODELLED))
    change(trace, next(e for e in trace["traceEvents"] if e["ph"] == "X"))
    return gzip.compress(json.dumps(trace).encode())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (altered(lambda trace, span: trace["otherData"].update(version=2)), "version 2"),
        (altered(lambda trace, span: trace["otherData"].update(origin="guessed")), "where its spans come from"),
        (altered(lambda trace, span: trace["otherData"].pop("device")), "where its spans come from"),
        (altered(lambda trace, span: span.pop("args")), "'args'"),
        (altered(lambda trace, span: span["args"].update(source="guessed")), "'guessed'"),
        (altered(lambda trace, span: span["args"].update(step=-1)), "step -1"),
        (altered(lambda trace, span: span["args"].update(step=10**9)), "step 1000000000"),
        (altered(lambda trace, span: span["args"].update(after=[1])), r"after \[1\]"),
        (altered(lambda trace, span: span["args"].update(after="layer 1 hash")), "after 'layer 1 hash'"),
        (altered(lambda trace, span: span.update(ts=float("nan"))), "runs from nan"),
        (altered(lambda trace, span: span.update(ts="1")), "ts '1'"),
        (altered(lambda trace, span: span.update(dur=-5)), "runs from"),
        (altered(lambda trace, span: span.update(dur=float("inf"))), "dur inf"),
        (altered(lambda trace, span: span.update(dur=None)), "dur None"),
        (altered(lambda trace, span: trace["traceEvents"].append(7)), "is 7"),
    ],
)  # fmt: skip
def test_an_altered_file_is_one_clear_error(data, said):
    with pytest.raises(InputError, match=said) as caught:
        chrome_trace.loads(data, "mine.json")
    assert "mine.json" in str(caught.value) and "\n" not in str(caught.value)
