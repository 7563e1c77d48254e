"""Charts of entries: weights at their tokens, blocks apart; shares that add up; texts that can hold anything."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.compressing import GateWeights, Moved, Split
from workbench.errors import InputError
from workbench.figures.compressing import (
    attention_split_chart,
    effective_tokens_chart,
    entry_weights,
    moved_chart,
    received_weights,
)

RNG = np.random.default_rng(0)
TEXTS = ["<b>", " a", "\n", " c", "d", "e", "f", "g", "h"]


def gates(kind: str = "csa") -> GateWeights:
    """Two entries of blocks of 3 tokens, 5 channels."""
    rows = 6 if kind == "csa" else 3
    weights = RNG.dirichlet(np.ones(rows), (2, 5)).transpose(0, 2, 1).astype(np.float32)
    first = np.array([0, 3]) - (3 if kind == "csa" else 0)
    return GateWeights("toy & co", 1, kind, weights, np.maximum(first[:, None] + np.arange(rows), -1))


def test_an_entry_has_a_row_for_each_token_and_its_blocks_apart():
    made = gates()
    fig = entry_weights(made, 1, TEXTS)
    before, mean_before, own, mean_own, even = fig.data
    percent = np.round(100 * made.weights[1])
    assert np.array_equal(before.z[:3], percent[:3]) and np.array_equal(own.z[3:], percent[3:])
    assert np.isnan(before.z[3:]).all() and np.isnan(own.z[:3]).all() and list(before.y) == list(own.y), "one axis of names"
    assert before.zmax == own.zmax == np.round(100 * made.weights[1]).max(), "one scale for both blocks"
    assert np.allclose([*mean_before.x, *mean_own.x], 100 * made.by_token[1])
    assert list(mean_own.y) == ["3 ·c", "4 d", "5 e"] and own.y[0] == mean_before.y[0] == "0 &lt;b&gt;"
    assert even.x[0] == pytest.approx(100 / 6) and fig.layout.shapes[0].y0 == 2.5 and "tokens 0–5" in fig.layout.title.text
    assert fig.layout.yaxis.range[0] > fig.layout.yaxis.range[1], "the earliest token is on top"


def test_the_first_entry_says_what_lies_before_the_text_and_hca_has_one_block():
    assert entry_weights(gates(), 0, TEXTS).data[0].y[2] == "before the text 2"
    heavy = entry_weights(gates("hca"), 1, TEXTS)
    assert len(heavy.data) == 3 and not heavy.layout.shapes and list(heavy.data[0].y) == ["3 ·c", "4 d", "5 e"]
    with pytest.raises(InputError, match="entries 0..1"):
        entry_weights(gates(), 2, TEXTS)


def test_an_hca_entry_of_true_length_is_a_small_view():
    weights = RNG.dirichlet(np.ones(128), (1, 512)).transpose(0, 2, 1).astype(np.float32)
    wide = GateWeights("toy", 2, "hca", weights, np.arange(128)[None])
    assert len(entry_weights(wide, 0, ["word"] * 128).to_json()) < 250_000


def test_effective_tokens_are_shares_of_the_channels_without_the_first_entry():
    made = gates()
    line = effective_tokens_chart([made]).data[0]
    assert np.sum(line.y) == pytest.approx(100) and "6 rows" in line.name
    counts = np.histogram(made.effective_tokens[1:], np.geomspace(1, 6, 33))[0]
    assert np.allclose(line.y, 100 * counts / 5)
    with pytest.raises(InputError):
        effective_tokens_chart([])


def test_the_text_is_coloured_by_what_each_token_gets_and_safe():
    made = gates()
    html = received_weights(made, TEXTS, [1])
    received = made.received(len(TEXTS))
    heaviest = int(received.argmax())
    assert html.count("<bdi") == len(TEXTS) and f'--a:70" title="token {heaviest}:' in html and '--a:0" title="token 8:' in html
    assert html.count('class="m"') == 1 and "&lt;b&gt;" in html and "<b>" not in html and "toy &amp; co" in html
    assert "the first 700 tokens" in received_weights(made, ["x"] * 900)


def test_each_head_is_a_bar_of_all_its_attention():
    shares = np.array([[0.5, 0.4, 0.1], [0.2, 0.2, 0.6]])
    fig = attention_split_chart([Split(layer, "csa", t, "<b>", shares, "toy") for t in (7, 9) for layer in (0, 1)])
    window, entries, sink = fig.data[:3]
    assert list(window.x) == [50, 20, 50, 20] and list(sink.x) == [10, 60, 10, 60] and window.y[1] == "layer 0 csa, head 1"
    assert np.allclose(np.sum([bar.x for bar in fig.data[3:]], axis=0), 100) and "&lt;b&gt;" in fig.layout.annotations[0].text
    assert entries.marker.pattern.bgcolor == entries.marker.color and sum(bar.showlegend for bar in fig.data) == 3
    with pytest.raises(InputError, match="attention_split"):
        attention_split_chart([])


def test_a_moved_text_shows_one_pair_and_both_changes():
    before, after = RNG.normal(size=(2, 3, 2, 4, 2))
    moved = Moved("toy", 1, "csa", np.array([0, 1, 1000]), np.array([0, 1e-5, 1e-4]), np.array([0, 3.0, 4.0]), before, after)
    summed, turned, left, back = moved_chart(moved, head=1, pair=2).data
    assert np.allclose(summed.x, before[:, 1, 2, 0]) and np.allclose(turned.y, after[:, 1, 2, 1])
    assert list(left.y) == [1e-7, 3, 4] and list(back.y) == [1e-7, 1e-5, 1e-4] and list(back.x) == ["0", "1", "1,000"]
    with pytest.raises(InputError, match="heads 0..1"):
        moved_chart(moved, head=2)
