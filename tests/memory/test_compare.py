"""The serial and the prefetched prefill: both are measured, labelled and complete, and nothing is left behind."""

import threading
from dataclasses import replace

import pytest
import torch

from tests.slow_reference import CONFIG, ENGRAM, random_ids, random_model
from workbench.errors import InputError, WorkbenchError
from workbench.memory.compare import TIMING_ROWS, TIMING_WIDTH, AlsoRead, TimingTable, compare_prefill
from workbench.trace import Timeline

WITH_ENGRAM = replace(CONFIG, engram=ENGRAM)
MIB = 2**20


@pytest.fixture(scope="module")
def model():
    return random_model(WITH_ENGRAM)


@pytest.fixture(scope="module")
def measured(model) -> tuple[Timeline, Timeline]:
    return compare_prefill(model, tokens=97, table_bytes=MIB)


def test_both_timelines_are_measured_and_say_what_was_done(measured):
    serial, prefetched = measured
    for timeline in (serial, prefetched):
        assert timeline.origin == "measured" and timeline.device.startswith("CPU")
        assert "one prefill of 97 tokens" in timeline.note and "1 MiB random table" in timeline.note
        assert all(span.origin == "measured" and span.step == 0 for span in timeline.spans)


def test_every_block_and_every_lookup_has_its_spans(measured):
    for timeline in measured:
        names = [(span.lane, span.name) for span in timeline.spans if span.lane != "stall"]
        wanted = [("compute", f"layer {n}") for n in range(4)]
        wanted += [("lookup", f"layer {n} {what}") for n in ENGRAM.layer_ids for what in ("hash", "gather")]
        wanted += [("ids", "token ids")]
        assert sorted(names) == sorted(wanted)


def test_blocks_follow_one_another_and_wait_for_their_rows(measured):
    for timeline in measured:
        blocks = [span for span in timeline.spans if span.lane == "compute"]
        assert [span.name for span in blocks] == [f"layer {n}" for n in range(4)]
        assert all(before.end_s <= after.start_s for before, after in zip(blocks, blocks[1:], strict=False))
        for layer in ENGRAM.layer_ids:
            of_layer = {
                s.name.split()[-1]: s for s in timeline.spans if s.lane == "lookup" and s.name.startswith(f"layer {layer}")
            }
            assert of_layer["hash"].end_s <= of_layer["gather"].start_s
            assert blocks[layer].after == (of_layer["gather"].name,)
            assert of_layer["gather"].end_s <= blocks[layer].end_s


def test_serial_lookups_stand_in_the_way_of_compute_entirely(measured):
    serial, _ = measured
    assert serial.stall_s >= serial.lookup_s > 0 and serial.hidden_fraction <= 0
    stalls = {span.name: span for span in serial.spans if span.lane == "stall"}
    for span in serial.spans:
        if span.lane == "lookup":
            stall = stalls[f"{' '.join(span.name.split()[:2])} waits"]
            assert stall.start_s <= span.start_s and span.end_s <= stall.end_s


def test_progress_rises_to_one_and_the_model_is_left_as_it_was(model):
    said: list[float] = []
    fetcher, before = model.fetcher, {t for t in threading.enumerate() if t.name.startswith("engram-rows")}
    compare_prefill(model, tokens=7, table_bytes=4096, progress=said.append)
    assert said == sorted(said) and len(said) == 8 and said[-1] == 1.0
    assert model.fetcher is fetcher
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert {t for t in threading.enumerate() if t.name.startswith("engram-rows")} <= before


def test_the_timing_table_changes_no_value(model):
    ids, table = random_ids(CONFIG, 1, 13), TimingTable(MIB, 13)
    engram = model.blocks[1].engram
    rows = torch.randint(0, engram.hash.rows, (1, 13, ENGRAM.rows_per_token))
    both = AlsoRead(engram.table, table, ENGRAM.rows_per_token)
    assert torch.equal(both.gather(rows.flatten()), engram.table.gather(rows.flatten()))
    scattered = (rows[..., :1] * 2654435761 * torch.arange(1, 2 * TIMING_ROWS, 2) % len(table.values)).flatten()
    assert torch.equal(table.staging.view(torch.int16), table.values[scattered].view(torch.int16))
    assert table.values.nbytes == MIB and ids.shape == (1, 13)


@pytest.mark.parametrize("after", [0, 3])
def test_a_stopped_comparison_says_so_and_leaves_no_thread(model, after):
    rounds: list[float] = []
    before = set(threading.enumerate())
    with pytest.raises(WorkbenchError, match="the comparison was stopped"):
        compare_prefill(model, tokens=5, table_bytes=4096, progress=rounds.append, should_stop=lambda: len(rounds) >= after)
    assert len(rounds) == after and set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "tokens must lie in 1..8192, got 0"),
        ({"tokens": 8193}, "got 8193"),
        ({"table_bytes": 2 * TIMING_WIDTH - 1}, "at least one row of 512 bytes, got 511"),
    ],
)
def test_unusable_settings_are_refused(model, settings, message):
    with pytest.raises(InputError, match=message):
        compare_prefill(model, **settings)


def test_a_model_without_engram_has_nothing_to_compare():
    with pytest.raises(InputError, match="no Engram layers"):
        compare_prefill(random_model(CONFIG))
