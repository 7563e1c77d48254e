"""Pictures of what V4.1 shares: bars cover the layers that share, dots are the entries chosen, titles say whence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import workbench as wb
from workbench.errors import InputError
from workbench.figures.sharing import choices_chart, replay_chart, sharing_chart
from workbench.prefills import Prefills
from workbench.presets import presets


def test_bars_cover_the_layers_that_share():
    fig = sharing_chart(presets["v4.1-flash"].config, "<V4.1>")
    bars = [data for data in fig.data if data.type == "bar"]
    streams, choices, pools = bars
    assert list(streams.text) == ["2", "8", "14", "20"] and list(choices.text) == ["2", "8", "14", "20", "24", "28", "32", "36"]
    spans = [(round(base + 0.45), round(base + x - 0.45)) for base, x in zip(streams.base, streams.x, strict=True)]
    assert spans == [(2, 7), (8, 13), (14, 19), (20, 39)]
    assert list(pools.text) == ["20"] * 4
    full = next(data for data in fig.data if data.name == "Full")
    assert list(full.x) == [2, 8, 14, 20] and list(next(d for d in fig.data if d.name == "Engram").x) == [1, 14]
    assert "&lt;V4.1&gt;" in fig.layout.title.text and len(fig.to_json()) < 30_000
    with pytest.raises(InputError, match="only V4.1"):
        sharing_chart(presets["v4-pro"].config, "x")


def test_dots_are_the_entries_each_layer_chose_at_their_place_in_the_text():
    trace = wb.Trace.load("needle")
    token = trace.length - 1
    fig = choices_chart(trace, token)
    chosen = [layer for layer in trace.layers if layer.selected is not None]
    assert len(fig.data) == len(chosen)
    for data, layer in zip(fig.data, chosen, strict=True):
        entries = sorted(int(e) for e in layer.selected[token] if e >= 0)
        assert list(data.x) == [e * layer.ratio for e in entries] and f"layer {layer.layer}" in data.y[0]
    assert fig.layout.shapes[0].x0 == trace.notes["needle"]["position"] and trace.device in fig.layout.title.text


def test_a_token_or_layers_that_are_not_there_are_one_clear_error():
    trace = wb.Trace.load("needle")
    for token in (-1, trace.length):
        with pytest.raises(InputError, match="has tokens 0"):
            choices_chart(trace, token)
    layers = tuple(layer for layer in trace.layers if layer.selected is None)
    with pytest.raises(InputError, match="no layer of this recording chooses"):
        choices_chart(replace(trace, layers=layers), 5)


def made(tokens, exact, replay, share):
    seconds = {"exact": exact, "replay": replay}
    return Prefills("toy <x>, measured on CPU", tokens, 2, seconds, share, {}, {}, 0.0, {"exact": (1, 2), "replay": (1, 3)})


def test_both_ways_are_drawn_in_the_order_of_their_prompts():
    fig = replay_chart([made(200, 0.02, 0.01, 0.6), made(100, 0.008, 0.006, 0.7)])
    exact, replay, share = fig.data
    assert list(exact.x) == [100, 200] and np.allclose(exact.y, [8, 20]) and np.allclose(replay.y, [6, 10])
    assert list(share.y) == [0.7, 0.6] and "measured on CPU" in fig.layout.title.text and "&lt;x&gt;" in fig.layout.title.text
    assert made(1, 1, 1, 1).same == 1
    with pytest.raises(InputError, match="nothing to draw"):
        replay_chart([])
