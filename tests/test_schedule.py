"""The virtual clock against the closed form of reference/engram-and-overlap.md, section 3, written down a second time here."""

import math
import random

import pytest

import workbench as wb
from workbench.errors import InputError
from workbench.schedule import Fetch, plan

TOLERANCE_S = 1e-9


def random_pass(seed):
    """Durations from nanoseconds to seconds, several Engram layers given in any order."""
    draw = random.Random(seed)
    blocks = draw.randrange(1, 24)
    scale = 10 ** draw.uniform(-6, 0)

    def some():
        return draw.choice([0.0, scale * draw.random(), scale * draw.random() * 5])

    layers = draw.sample(range(blocks), draw.randrange(1, min(blocks, 6) + 1))
    fetches = [
        Fetch(layer=layer, hash_s=some(), gather_s=some(), link_s=some(), chunked=draw.random() < 0.3) for layer in layers
    ]
    return [some() for _ in range(blocks)], fetches, draw.choice([0.0, some()])


def fetch_seconds(fetch):
    if fetch.chunked:
        return fetch.hash_s + max(fetch.gather_s, fetch.link_s)
    return fetch.hash_s + fetch.gather_s + fetch.link_s


def closed_form(block_s, fetches, t0, policy):
    """Stall of each Engram layer, by layer: done_1 = t0 + T_f1, done_k = done_(k-1) + T_fk, stall_k = max(0, done_k - start_k).

    A serial fetch begins when compute is there, so its whole T_f is a stall, and what the ids are still missing.
    """
    ordered = sorted(fetches, key=lambda f: f.layer)
    stalls, done = {}, t0
    for fetch in ordered:
        start = sum(block_s[: fetch.layer]) + sum(stalls.values())
        if policy == "serial":
            stalls[fetch.layer] = max(0.0, t0 - start) + fetch_seconds(fetch)
        else:
            done = done + fetch_seconds(fetch)
            stalls[fetch.layer] = max(0.0, done - start)
    return stalls


@pytest.mark.parametrize("policy", ["prefetch", "serial"])
@pytest.mark.parametrize("seed", range(150))
def test_the_virtual_clock_equals_the_closed_form(seed, policy):
    block_s, fetches, t0 = random_pass(seed)
    got = plan(block_s, fetches, policy, ids_known_s=t0)
    expected = closed_form(block_s, fetches, t0, policy)
    assert [x.layer for x in got.layers] == sorted(expected)
    for layer in got.layers:
        assert layer.stall_s == pytest.approx(expected[layer.layer], abs=TOLERANCE_S, rel=0)
    total = sum(block_s) + sum(expected.values())
    assert got.total_s == pytest.approx(total, abs=TOLERANCE_S, rel=0)
    # The spans are the same pass again: what is drawn adds up to what is said.
    timeline = got.timeline
    assert timeline.stall_s == pytest.approx(got.stall_s, abs=TOLERANCE_S)
    assert timeline.fetch_s == pytest.approx(got.fetch_s, abs=TOLERANCE_S)
    compute = [s for s in timeline.spans if s.lane == "compute"]
    assert max((s.end_s for s in compute), default=0.0) == pytest.approx(total, abs=TOLERANCE_S)
    if got.fetch_s > 0:
        assert timeline.hidden_fraction == pytest.approx(got.hidden_fraction, abs=1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_nothing_begins_before_what_it_waits_for_is_done(seed):
    block_s, fetches, t0 = random_pass(seed)
    fetches = [Fetch(layer=f.layer, hash_s=f.hash_s, gather_s=f.gather_s, link_s=f.link_s) for f in fetches]  # none chunked
    for policy in ("prefetch", "serial"):
        timeline = plan(block_s, fetches, policy, ids_known_s=t0).timeline
        assert {s.origin for s in timeline.spans} == {timeline.origin} == {"modelled"}
        pairs = timeline.dependencies()
        named = {(cause.name, span.name) for cause, span in pairs}
        for fetch in fetches:
            i = f"layer {fetch.layer}"
            last = f"{i} copy" if fetch.link_s > 0 else f"{i} gather"
            assert {("token ids", f"{i} hash"), (f"{i} hash", f"{i} gather"), (last, i)} <= named
            assert fetch.link_s == 0 or (f"{i} gather", f"{i} copy") in named
        for cause, span in pairs:
            if span.lane != "stall":  # a stall ends, rather than begins, with its cause
                assert span.start_s >= cause.end_s - TOLERANCE_S
        for lane in ("compute", "lookup", "transfer", "stall"):  # one thing at a time on each
            spans = sorted((s for s in timeline.spans if s.lane == lane), key=lambda s: (s.start_s, s.end_s))
            assert all(b.start_s >= a.end_s - TOLERANCE_S for a, b in zip(spans, spans[1:], strict=False))


def test_fetching_ahead_never_takes_longer_and_resident_rows_take_nothing():
    for seed in range(60):
        block_s, fetches, t0 = random_pass(seed)
        ahead, serial, resident = (plan(block_s, fetches, p, ids_known_s=t0) for p in ("prefetch", "serial", "resident"))
        assert resident.total_s == pytest.approx(sum(block_s)) and resident.layers == ()
        assert resident.total_s <= ahead.total_s + TOLERANCE_S and ahead.total_s <= serial.total_s + TOLERANCE_S
        assert {s.lane for s in resident.timeline.spans} == {"compute"} and math.isnan(resident.hidden_fraction)


def test_a_pass_worked_out_by_hand():
    fetches = [Fetch(layer=1, hash_s=1, gather_s=2, link_s=1), Fetch(layer=2, hash_s=1, gather_s=1, link_s=1)]
    ahead = plan([3.0, 5.0, 2.0], fetches)  # the first is there at 4, the second at 7; layer 2 begins at 9
    assert [x.stall_s for x in ahead.layers] == [1.0, 0.0] and ahead.total_s == 11.0
    assert [x.hidden_fraction for x in ahead.layers] == [0.75, 1.0] and ahead.hidden_fraction == pytest.approx(6 / 7)
    assert plan([3.0, 5.0, 2.0], fetches, "serial").total_s == 17.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"block_s": [1.0, -1.0]}, "compute of block 1"),
        ({"block_s": [1.0, math.nan]}, "got nan"),
        ({"block_s": ["1", 1.0]}, "got '1'"),
        ({"fetches": [Fetch(layer=2)]}, "among 0..1"),
        ({"fetches": [Fetch(layer=1), Fetch(layer=1)]}, r"layers \[1, 1\]"),
        ({"policy": "eager"}, "'eager' is unknown"),
        ({"ids_known_s": math.inf}, "ids_known_s"),
    ],
)
def test_bad_durations_are_one_clear_error(change, said):
    with pytest.raises(InputError, match=said):
        plan(**({"block_s": [1.0, 1.0], "fetches": [Fetch(layer=1)]} | change))


def test_a_fetch_checks_its_own_durations():
    with pytest.raises(InputError, match="gather_s of the fetch for layer 3"):
        Fetch(layer=3, gather_s=-1e-9)


def test_the_module_is_a_public_name():
    assert wb.schedule.plan is plan and "schedule" in dir(wb)
