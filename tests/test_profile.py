"""Imported profiler traces: copies under compute by stream, the clocks' alignment, and what is no trace at all."""

import copy
import gzip
import json
import math
import random
import threading
import time

import pytest

from tests.profiler_traces import BASE_NS, cuda_trace, document, on_stream, span
from workbench import chrome_trace
from workbench.errors import InputError
from workbench.profile import Profile

US = 1e-6


def read(trace, name="trace.json"):
    return chrome_trace.loads(json.dumps(trace).encode(), name)


@pytest.fixture(scope="module")
def cuda():
    return read(cuda_trace())


def by_name(profile):
    return {x.name: x for x in profile.overlaps}


def test_every_stream_says_how_much_of_it_compute_hid(cuda):
    found = by_name(cuda)
    assert list(found) == [
        "stream 7: kernels", "stream 7: copies", "stream 7: memory sets", "stream 9: kernels", "stream 20: copies",
        "thread 4322 (python)",
    ]  # fmt: skip
    upload, download = found["stream 20: copies"], found["stream 7: copies"]
    assert (upload.busy_s, upload.hidden_s, upload.exposed_s) == pytest.approx((150 * US, 70 * US, 80 * US))
    assert upload.hidden_fraction == pytest.approx(70 / 150) and upload.nbytes == 3_000_000
    assert (download.hidden_s, download.exposed_s) == pytest.approx((0, 10 * US))
    assert found["stream 7: memory sets"].hidden_s == pytest.approx(5 * US)
    assert found["stream 7: kernels"].hidden_s == found["stream 9: kernels"].hidden_s == pytest.approx(20 * US)
    assert found["thread 4322 (python)"].busy_s == pytest.approx((45 + 10 + 120) * US)  # 1090..1135, 1300..1310, 1320..1440
    assert cuda.device == "NVIDIA Imaginary"


def test_what_is_left_out_is_counted(cuda):
    kinds = ("ProfilerStep", "python_function", "gpu_user_annotation", "trace", "user_annotation")
    assert cuda.left_out == dict.fromkeys(kinds, 1)


def test_the_alignment_error_follows_from_launches_and_synchronisations(cuda):
    found = cuda.alignment
    assert (found.least_s, found.most_s) == pytest.approx((-20 * US, 5 * US)) and found.in_order
    assert (found.launches, found.synchronisations) == (5, 1) and found.error_s == pytest.approx(20 * US)
    assert "-20.0 to +5.0 us, by 5 launches and 1 synchronisation" in str(found)


@pytest.mark.parametrize(("shift_us", "off_us"), [(-33, 13), (21, 16)])
def test_a_device_clock_that_cannot_be_right_is_said_to_be_off(shift_us, off_us):
    trace = cuda_trace()
    for event in trace["traceEvents"]:
        if "stream" in event.get("args", {}):
            event["ts"] += shift_us
    found = read(trace).alignment
    assert not found.in_order and f"off by at least {off_us}.0 us" in str(found) and "not corrected" in str(found)


def test_without_a_synchronisation_one_side_stays_unknown():
    trace = cuda_trace()
    trace["traceEvents"] = [e for e in trace["traceEvents"] if e["name"] != "cudaDeviceSynchronize"]
    assert read(trace).alignment.most_s is None and "early unknown" in str(read(trace).alignment)
    trace["traceEvents"] = [e for e in trace["traceEvents"] if e.get("cat") != "cuda_runtime"]
    assert read(trace).alignment is None


def test_arrows_run_from_launch_to_kernel(cuda):
    arrows = cuda.arrows(0.0, 1.0, 10)
    first = ("thread 4322 (python)", pytest.approx(10 * US), "stream 7: kernels", pytest.approx(30 * US))  # zero is at 1090
    assert len(arrows) == 5 and first in arrows
    assert all(left <= right for _, left, _, right in arrows)
    assert cuda.arrows(0.0, 1.0, 4) == []  # too many to draw
    assert cuda.arrows(0.0, 35 * US, 10) == [first]


@pytest.mark.parametrize("seed", range(25))
def test_overlaps_agree_with_counting_microseconds(seed):
    draw = random.Random(seed)
    events, ran = [], {}
    for number in range(draw.randrange(2, 40)):
        kind, stream = draw.choice([("kernel", "kernels"), ("gpu_memcpy", "copies")]), draw.randrange(3)
        start, duration = draw.randrange(500), draw.randrange(60)
        events.append(on_stream(kind[0], "x", start, duration, stream, number))
        ran.setdefault((kind[1], stream), set()).update(range(start, start + duration))
    profile = read(document(events))
    for (kind, stream), cells in ran.items():
        others = [c for (k, s), c in ran.items() if k == "kernels" and not (kind == "kernels" and s == stream)]
        found = by_name(profile)[f"stream {stream}: {kind}"]
        assert found.busy_s == pytest.approx(len(cells) * US, abs=1e-12)
        assert found.hidden_s == pytest.approx(len(cells & set().union(*others)) * US, abs=1e-12)


def test_a_stream_is_compared_with_its_own_device_only():
    elsewhere = on_stream("kernel", "k", 0, 100, 7, 1)
    elsewhere["args"]["device"] = elsewhere["pid"] = 1
    found = by_name(read(document([elsewhere, on_stream("gpu_memcpy", "m", 0, 100, 7, 2)])))
    assert found["device 0 stream 7: copies"].hidden_s == 0 and "device 1 stream 7: kernels" in found


def test_threads_without_operators_are_shown_by_their_annotations():
    events = [
        span("user_annotation", "everything", 0, 1000, tid=1),
        span("cpu_op", "aten::mm", 100, 50, tid=1),
        span("user_annotation", "gather", 120, 80, tid=2),
    ]
    main, worker = read(document(events)).overlaps
    assert (main.busy_s, worker.busy_s, worker.hidden_s) == pytest.approx((50 * US, 80 * US, 30 * US))


def test_threads_of_one_name_stay_apart():
    names = [{"ph": "M", "name": "thread_name", "pid": 1, "tid": t, "args": {"name": "worker"}} for t in (5, 6)]
    profile = read(document([*names, span("cpu_op", "a", 0, 1, 1, 5), span("cpu_op", "a", 0, 1, 1, 6)]))
    assert [t.name for t in profile.tracks] == ["worker [1/5]", "worker [1/6]"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A real torch.profiler trace of a main thread that multiplies while a worker sleeps, and when the worker did so."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    left = torch.randn(64, 64)
    noted = {}

    def work():
        with record_function("gather"):
            noted["began"] = time.time_ns()
            time.sleep(0.05)
            noted["ended"] = time.time_ns()

    settings = {}
    try:  # a private setting; without it worker threads are missing from the trace
        from torch._C._profiler import _ExperimentalConfig

        settings["experimental_config"] = _ExperimentalConfig(profile_all_threads=True)
    except (ImportError, TypeError):
        pytest.skip("this torch cannot profile all threads")
    with profile(activities=[ProfilerActivity.CPU], **settings) as profiler:
        worker = threading.Thread(target=work)
        worker.start()
        while worker.is_alive():
            left = torch.nn.functional.normalize(left @ left)
        worker.join()
    path = tmp_path_factory.mktemp("profile") / "cpu.json"
    profiler.export_chrome_trace(str(path))
    return path, noted


def test_a_real_cpu_trace_opens_and_places_unix_time(recorded):
    path, noted = recorded
    profile = chrome_trace.load(path)
    assert isinstance(profile, Profile) and len(profile.tracks) == 2 and profile.alignment is None
    worker = next(t for t in profile.tracks if t.names == ("gather",))
    main = next(t for t in profile.tracks if t is not worker)
    assert any(name.startswith("aten::") for name in main.names)
    slack = 0.02  # of 0.05; the reference saw 9 and 120 us, a loaded machine may stop a thread between two lines
    assert profile.seconds_at(noted["began"]) == pytest.approx(worker.start_s[0], abs=slack)
    assert profile.seconds_at(noted["ended"]) == pytest.approx(worker.end_s[0], abs=slack)
    overlap = by_name(profile)[worker.name]
    assert overlap.busy_s >= 0.05 and 0 < overlap.hidden_s <= overlap.busy_s


def test_a_compressed_trace_is_the_same(recorded, tmp_path):
    path, _ = recorded
    packed = tmp_path / "cpu.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert chrome_trace.load(packed).overlaps == chrome_trace.load(path).overlaps


def test_unix_time_needs_the_traces_own_zero(cuda):
    assert cuda.seconds_at(BASE_NS + 1_120_000) == pytest.approx(30 * US)
    with pytest.raises(InputError, match="baseTimeNanoseconds"):
        read({"traceEvents": cuda_trace()["traceEvents"]}).seconds_at(BASE_NS)


def test_a_bare_list_of_events_is_a_trace_too():
    assert read(cuda_trace()["traceEvents"]).spans == read(cuda_trace()).spans


def broken(change):
    trace = copy.deepcopy(cuda_trace())
    change(trace["traceEvents"])
    return json.dumps(trace).encode()


def set_field(field, value):
    return broken(lambda events: events[11].__setitem__(field, value))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no JSON"),
        (b"not json", "no JSON"),
        (json.dumps(cuda_trace()).encode()[:-40], "cut short"),
        (b"\xff\xfe\x00bad", "no JSON"),
        (b"[" * 200_000, "no JSON"),
        (b"null", "no Chrome trace: .* got None"),
        (b'"traceEvents"', "no Chrome trace"),
        (b"17", "got 17"),
        (b'{"name": "a package", "version": "1"}', "got an object with 'name', 'version'"),
        (b'{"traceEvents": {"ph": "X"}}', "no Chrome trace"),
        (b'{"traceEvents": []}', "no complete spans"),
        (b"[]", "no complete spans"),
        (b"[1, 2]", "event 0 is 1"),
        (broken(lambda events: events.insert(3, None)), "event 3 is None"),
        (broken(lambda events: events[11].pop("ts")), "event 11 has ts None"),
        (broken(lambda events: events[11].pop("dur")), "event 11 has dur None"),
        (set_field("ts", math.nan), "event 11 has ts nan"),
        (set_field("ts", math.inf), "event 11 has ts inf"),
        (set_field("dur", math.nan), "event 11 has dur nan"),
        (set_field("dur", -1), "event 11 has dur -1"),
        (set_field("dur", "5"), "event 11 has dur '5'"),
        (set_field("ts", [1]), r"event 11 has ts \[1\]"),
        (set_field("ts", 10**400), "event 11 has ts 1000"),
        (gzip.compress(json.dumps(cuda_trace()).encode())[:-30], "damaged"),
        (b"\x1f\x8bnothing", "damaged"),
    ],
)
def test_what_cannot_be_read_is_one_clear_error(data, said):
    with pytest.raises(InputError, match=said) as caught:
        chrome_trace.loads(data, "mine.json")
    assert "mine.json" in str(caught.value) and len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_odd_but_harmless_fields_are_taken_as_they_are():
    odd = span("cpu_op", "x", 0, 5, pid=[1], tid={"a": 1})
    odd["args"] = "none"
    bare = {"ph": "X", "ts": 1, "dur": 2}
    strange = on_stream("kernel", "k", 1, 2, 7, "seven")
    strange["args"]["bandwidth"] = math.inf
    assert read([odd, bare, strange]).spans == 3


def test_a_trace_that_is_too_large_is_refused_before_it_is_parsed(monkeypatch, tmp_path):
    data = json.dumps(cuda_trace()).encode()
    monkeypatch.setattr(chrome_trace, "MAX_BYTES", len(data) - 1)
    for given in (data, gzip.compress(data)):
        with pytest.raises(InputError, match="more than .* profile fewer steps"):
            chrome_trace.loads(given)
    path = tmp_path / "big.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match="big.json holds more than"):
        chrome_trace.load(path)
    with pytest.raises(InputError, match="no file"):
        chrome_trace.load(tmp_path / "none.json")
