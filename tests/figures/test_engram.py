"""Engram on one text: n-grams and collisions held against a slow count, colours against gates, charts against the model."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.figures.test_text import Tokens
from tests.slow_reference import CONFIG, ENGRAM, random_model
from tests.synthetic import synthetic_trace
from workbench.config import EngramConfig
from workbench.engram import Ngrams, engram_effect
from workbench.errors import InputError
from workbench.figures.engram import effect_paint, engram_effect_chart, engram_text, gate_paint, ngrams_html
from workbench.live import run
from workbench.trace import Trace
from workbench.training.recipes import _shared_stream

VIEW_BYTES = 250_000
SMALL = EngramConfig(layer_ids=(1, 3), vocab_size=11, compressed_vocab_size=29, n_heads=2, head_dim=3, pad_token_id=7)
IDS = [int(i) for i in np.random.default_rng(5).integers(0, 12, 61)]  # few words, so that n-grams come again


def traced(config, ids=IDS, seed=0):
    model = random_model(config, seed)
    live = run(model, ids, max_new_tokens=0)
    live.wait()
    assert live.error is None
    return model, live.trace


def masked_v41():
    """V4.1 of the recipe, smaller tables so that rows collide, with an image token: two Engram layers of 2-, 3- and 4-grams."""
    shape = _shared_stream(53, 29)
    engram = replace(shape.engram, layer_ids=(1, 3), vocab_size=13, compressed_vocab_size=29, n_heads=3, pad_token_id=4)
    return replace(shape, engram=engram, image_token_id=9)


@pytest.fixture(scope="module", params=["v4", "v41"])
def read(request):
    return traced(replace(CONFIG, engram=SMALL) if request.param == "v4" else masked_v41())


def slow_ngram(model, ids, t, order):
    """What is hashed at token t: canonical ids, newest first, the pad's own from the first gap on."""
    pad, image = (
        int(model.engram_canonical_ids[model.config.engram.pad_token_id]),
        getattr(model.config, "image_token_id", None),
    )
    out, stopped = [], False
    for back in range(order):
        stopped = stopped or t - back < 0 or ids[t - back] == image
        out.append(pad if stopped else int(model.engram_canonical_ids[ids[t - back]]))
    return tuple(out)


def test_repeats_and_collisions_are_those_a_slow_count_finds(read):
    model, trace = read
    ngrams, heads = Ngrams(trace), model.config.engram.n_heads
    assert ngrams.orders == tuple(range(2, model.config.engram.max_ngram_size + 1)) and list(ngrams.layers) == [1, 3]
    collisions = 0
    for memory in trace.engram:
        for t in range(trace.length):
            found = ngrams.of(memory.layer, t)
            for i, ngram in enumerate(found):
                spelled = [slow_ngram(model, IDS, u, ngram.order) for u in range(trace.length)]
                same = [u for u in range(trace.length) if spelled[u] == spelled[t]]
                assert ngram.repeats == tuple(u for u in same if u != t)
                assert ngram.tokens == tuple(range(t - ngram.order + 1, t + 1))
                for head, use in enumerate(ngram.uses):
                    column = memory.rows[:, i * heads + head]
                    readers = [u for u in range(trace.length) if column[u] == column[t]]
                    assert use.row == column[t] and use.head == head
                    assert use.shared_with == tuple(u for u in readers if u not in same)
                    assert set(same) <= set(readers)  # the same n-gram always reads the same row
                    collisions += bool(use.shared_with)
            assert ngrams.collided(memory.layer)[t] == sum(bool(use.shared_with) for n in found for use in n.uses)
        counts = ngrams.counts(memory.layer)
        reads = memory.rows.flatten().tolist()
        assert (counts.reads, counts.rows) == (len(reads), len(set(reads)))
        clashing = {
            use.row for t in range(trace.length) for n in ngrams.of(memory.layer, t) for use in n.uses if use.shared_with
        }
        assert counts.shared == len(clashing)
    assert collisions > 50, "tables this small must collide, or the test shows nothing"


def test_a_recording_without_ids_tells_the_same_by_its_rows():
    _, trace = traced(replace(CONFIG, engram=ENGRAM))
    assert trace.engram[0].ids is not None and trace.engram[0].pad >= 0
    old = replace(trace, engram=tuple(replace(memory, ids=None, pad=-1) for memory in trace.engram))
    new, before = Ngrams(trace), Ngrams(old)
    assert all(new.of(layer, t) == before.of(layer, t) for layer in (1, 3) for t in range(trace.length))


def test_a_saved_trace_keeps_what_was_hashed(tmp_path, read):
    _, trace = read
    loaded = Trace.load(trace.save(tmp_path / "run"))
    assert all(
        np.array_equal(one.ids, other.ids) and one.pad == other.pad
        for one, other in zip(loaded.engram, trace.engram, strict=True)
    )
    assert all(Ngrams(loaded).of(3, t) == Ngrams(trace).of(3, t) for t in (0, 17, 60))


def test_what_is_not_there_is_one_clear_error(read):
    _, trace = read
    ngrams = Ngrams(trace)
    for call, message in (
        (lambda: Ngrams(synthetic_trace(31, kinds=("gqa",))), "no Engram"),
        (lambda: ngrams.of(2, 0), r"Engram layers \[1, 3\], got 2"),
        (lambda: ngrams.of(1, 61), r"tokens 0\.\.60, got 61"),
        (lambda: gate_paint(trace, 0), r"Engram layers \[1, 3\], got 0"),
        (lambda: gate_paint(trace, 1, 9), r"stream must be 'mean' or 0\.\.[23], got 9"),
        (lambda: engram_text(trace, ngrams, 1, -1, gate_paint(trace, 1)), r"tokens 0\.\.60, got -1"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_the_strongest_colour_is_the_highest_gate_and_the_legend_has_the_range(read):
    _, trace = read
    for stream in ("mean", 1):
        paint = gate_paint(trace, 3, stream)
        gates = trace.engram[1].gates.astype(float)
        values = gates.mean(1) if stream == "mean" else gates[:, 1]
        page = engram_text(trace, Ngrams(trace), 3, 20, paint)
        tokens = Tokens(page).found
        assert list(tokens) == list(range(61))
        strength = np.array([float(re.search(r"--a:(\d+)", tokens[t]["style"])[1]) for t in range(61)])
        expected = 65 * (values - values.min()) / (values.max() - values.min())
        np.testing.assert_allclose(strength, expected, atol=0.6)
        assert f"{values.min():.2f} <span class='bar'>" in page and f"</span> {values.max():.2f}" in page
        assert [t for t in tokens if "q" in tokens[t]["class"].split()] == [20]
        dotted = [t for t in tokens if "x" in tokens[t]["class"].split()]
        assert dotted == np.flatnonzero(Ngrams(trace).collided(3)).tolist()


def test_the_table_has_every_row_and_gate_of_the_token_and_marks_collisions(read):
    model, trace = read
    ngrams = Ngrams(trace)
    token = int(ngrams.collided(1).argmax())
    page = ngrams_html(trace, ngrams, 1, token)
    for row in trace.engram[0].rows[token].tolist():
        assert f"{row:,}" in page
    for memory in trace.engram:
        for gate in memory.gates[token].astype(np.float32).tolist():
            assert f">{gate:.3f}<" in page
    assert page.count("≠ collides with") == ngrams.collided(1)[token] > 0
    assert page.count("class='n clash'") == ngrams.collided(1)[token]
    first = ngrams_html(trace, ngrams, 1, 0)
    assert first.count("<i>start</i>") == sum(range(1, model.config.engram.max_ngram_size))


def test_a_hostile_token_stays_text_in_every_part(read):
    model, trace = read
    nasty = ("<script>alert(1)</script>", "\"><img src=x onerror='alert(1)'>", "\u202eabc", "&lt;")
    texts = tuple(nasty[i % 4] for i in range(len(trace.token_texts)))
    hostile = replace(trace, token_texts=texts)
    ngrams = Ngrams(hostile)
    pages = engram_text(hostile, ngrams, 1, 5, gate_paint(hostile, 1)) + ngrams_html(hostile, ngrams, 1, 30)
    assert "<script" not in pages and "<img" not in pages and "\u202e" not in pages and "&amp;lt;" in pages
    effect = replace(engram_effect(model, IDS), texts=dict.fromkeys(range(53), "<b>x</b>"))
    chart = engram_effect_chart(effect, 3)
    assert "<b>x" not in chart.to_json().replace("\\u003c", "<") and "&lt;b&gt;x" in chart.layout.title.text


def test_a_long_text_is_cut_around_the_token_and_says_so():
    _, trace = traced(replace(CONFIG, engram=SMALL), [i % 50 for i in range(3001)])
    page = engram_text(trace, Ngrams(trace), 1, 1500, gate_paint(trace, 1))
    shown = list(Tokens(page).found)
    assert shown == list(range(1500 - len(shown) // 2, 1500 + len(shown) // 2 + 1)) and len(page.encode()) < VIEW_BYTES
    assert f"{shown[0]:,} tokens left out" in page and f"{3000 - shown[-1]:,} tokens left out" in page


def test_the_effect_is_what_two_forward_passes_say(read):
    model, trace = read
    effect = engram_effect(model, IDS, guesses=7)
    silent = zeroed(model)
    line = torch.tensor([IDS])
    with torch.inference_mode():
        on, off = (m(line)[0].double().softmax(-1).numpy() for m in (model, silent))
    np.testing.assert_allclose(effect.kl, (on * np.log(on / off)).sum(1), rtol=1e-3, atol=1e-6)
    assert effect.kl.max() > 1e-3 and effect.on_ids.shape == (61, 7)
    for t in (0, 13, 60):
        mine, other = np.argsort(-on[t])[:7], np.argsort(-off[t])[:7]
        assert effect.on_ids[t].tolist() == mine.tolist() and effect.off_ids[t].tolist() == other.tolist()
        np.testing.assert_allclose(effect.on_probs[t], on[t, mine], rtol=1e-4)
        np.testing.assert_allclose(effect.on_probs_off[t], off[t, mine], rtol=1e-4)
        np.testing.assert_allclose(effect.off_probs_on[t], on[t, other], rtol=1e-4)
    np.testing.assert_allclose(effect.on_loss, -np.log(on[range(60), IDS[1:]]), rtol=1e-3)
    np.testing.assert_allclose(effect.off_loss, -np.log(off[range(60), IDS[1:]]), rtol=1e-3)


def zeroed(model):
    """The same model with value projections of zero."""
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer in model.config.engram.layer_ids:
            other.blocks[layer].engram.wkv.weight[-model.config.hidden_size :] = 0
    return other


def test_the_chart_has_both_rankings_with_numbers(read):
    model, _ = read
    effect = engram_effect(model, IDS)
    chart = engram_effect_chart(effect, 13)
    bars = [trace for trace in chart.data if trace.type == "bar"]
    assert [bar.name for bar in bars] == ["with Engram", "Engram switched off"]
    np.testing.assert_allclose(bars[0].x, effect.on_probs[13])
    np.testing.assert_allclose(bars[1].x, effect.off_probs[13])
    ticks = [trace for trace in chart.data if trace.type == "scatter"]
    np.testing.assert_allclose(ticks[0].x, effect.on_probs_off[13])
    assert f"{effect.kl[13]:.3f} nats" in chart.layout.title.text and "measured on CPU" in chart.layout.title.text
    assert f"{np.exp(-effect.on_loss[13]):.1%} with" in chart.layout.title.text
    assert "followed" not in engram_effect_chart(effect, 60).layout.title.text
    with pytest.raises(InputError, match=r"0\.\.60, got 61"):
        engram_effect_chart(effect, 61)


def test_colour_by_effect_is_the_root_of_its_share():
    _, trace = traced(replace(CONFIG, engram=SMALL))
    effect = engram_effect(random_model(replace(CONFIG, engram=SMALL)), IDS)
    paint = effect_paint(effect)
    top = int(effect.kl.argmax())
    assert paint.strength(top) == 65 and paint.strength(int(effect.kl.argmin())) == 0
    assert paint.middle == pytest.approx(effect.kl.min() + (effect.kl.max() - effect.kl.min()) / 4)
    assert "nats" in engram_text(trace, Ngrams(trace), 1, 3, paint)
