"""Widgets of caches: controls change what is drawn, and views of one recording move together."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.synthetic import synthetic_trace
from workbench.cost import decode_bytes, kv_bytes
from workbench.errors import InputError
from workbench.trace import Trace
from workbench.widgets.caches import COMPARED, CacheSlots, HeldAndRead
from workbench.widgets.memory import KVCacheGrowth


def test_length_and_storage_change_the_bars():
    widget = HeldAndRead()
    assert list(widget.figure.data[0].x) == [kv_bytes(name, 2**20)["total"] for name in COMPARED]
    widget.length.value = 4096
    assert list(widget.figure.data[1].x) == [decode_bytes(name, 4096)["total"] for name in COMPARED]
    widget.storage.value = "bf16"
    assert list(widget.figure.data[0].x) == [kv_bytes(name, 4096, "bf16")["total"] for name in COMPARED]
    assert "bf16" in widget.figure.layout.title.text and len(json.dumps(widget.view.outputs)) < 250_000


def test_an_unknown_model_is_one_clear_error():
    with pytest.raises(InputError, match="v9"):
        HeldAndRead(("v9",))


def test_slots_follow_the_token_and_move_the_other_views():
    trace = replace(synthetic_trace(97))
    slots, growth = CacheSlots(trace), KVCacheGrowth(trace)
    slots.token.value = 90
    assert "after 91 tokens" in slots.html.value and growth.step.value == trace.step_of_token(90)
    growth.step.value = growth.step.max
    assert slots.token.value == 96 and "after 97 tokens" in slots.html.value
    slots.layer.value = 2
    assert "Layer 2 (hca)" in slots.html.value and slots.session.layer == 2


def test_a_recording_is_shown_at_once():
    widget = CacheSlots(replace(Trace.load("needle")))
    assert "tail, the open block" in widget.html.value and len(widget.html.value) < 100_000


def test_a_run_without_layers_says_so():
    trace = replace(synthetic_trace(10), layers=(), engram=())
    assert "Nothing was recorded yet" in CacheSlots(trace).html.value
