"""EngramExplorer without a browser: which token, layer and stream it shows, when Engram is switched off, and what it says."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from tests.slow_reference import CONFIG, random_model
from tests.synthetic import synthetic_trace
from tests.widgets.fakes import FakeRun, eventually
from workbench.checkpoint import load
from workbench.config import EngramConfig
from workbench.engram import Ngrams, engram_effect
from workbench.figures.engram import engram_text, gate_paint, ngrams_html
from workbench.live import run
from workbench.needle import untrained_twin
from workbench.training.recipes import _shared_stream
from workbench.widgets.engram import OFF, EngramExplorer
from workbench.widgets.render import CHART_MIME
from workbench.widgets.session import session_of

VIEW_BYTES = 250_000
IDS = [int(i) for i in np.random.default_rng(5).integers(0, 12, 61)]
SMALL = EngramConfig(layer_ids=(1, 3), vocab_size=11, compressed_vocab_size=29, n_heads=2, head_dim=3, pad_token_id=7)


def finished(model, ids=IDS):
    live = run(model, ids, max_new_tokens=0)
    live.wait()
    assert live.error is None
    return live


@pytest.fixture(scope="module")
def model():
    return random_model(replace(CONFIG, engram=SMALL))


@pytest.fixture
def explorer(model):
    return EngramExplorer(finished(model))


def said(widget):
    return re.sub("<[^>]+>", "", widget.status.value)


def test_a_finished_run_is_shown_whole_at_once(explorer, model):
    trace = explorer.session.trace
    assert explorer.token.value == explorer.session.token
    assert explorer.text.html == engram_text(trace, Ngrams(trace), 1, explorer.session.token, gate_paint(trace, 1))
    assert explorer.details.value == ngrams_html(trace, Ngrams(trace), 1, explorer.session.token)
    expected = engram_effect(model, IDS)
    np.testing.assert_allclose(explorer.effect.kl, expected.kl)
    assert (
        CHART_MIME in explorer.view.outputs[0]["data"]
        and f"token {explorer.session.token}" in explorer.figure.layout.title.text
    )
    assert f"{expected.on_loss.mean():.3f} nats per token with Engram" in said(explorer)
    assert trace.label in explorer.title.value


def test_arrow_keys_a_click_and_the_field_choose_the_token_in_every_view(explorer):
    explorer.session.choose_token(20)
    explorer.text._handle_custom_msg({"type": "move", "by": 1}, [])
    assert explorer.session.token == explorer.token.value == 21
    explorer.text._handle_custom_msg({"type": "click", "token": "7"}, [])
    assert explorer.session.token == 7 and "Token 7 " in explorer.details.value
    assert "token 7 " in explorer.figure.layout.title.text and 'class="g q" data-token="7"' in explorer.text.html.replace(
        " x", ""
    )
    explorer.token.value = 0
    explorer.text._handle_custom_msg({"type": "move", "by": -1}, [])  # there is nothing before the first
    explorer.text._handle_custom_msg({"type": "click"}, [])
    assert explorer.session.token == 0 and "Token 0 " in explorer.details.value


def test_the_colour_menu_has_every_layer_and_stream_and_the_effect(explorer):
    streams = CONFIG.hc_mult
    wanted = [(layer, what) for layer in (1, 3) for what in ("mean", *range(streams))] + [(1, OFF)]
    assert [value for _, value in explorer.colour.options] == wanted
    trace = explorer.session.trace
    explorer.colour.value = (3, 2)
    token = explorer.session.token
    assert explorer.text.html == engram_text(trace, Ngrams(trace), 3, token, gate_paint(trace, 3, 2))
    assert explorer.details.value == ngrams_html(trace, Ngrams(trace), 3, token)
    explorer.colour.value = (1, OFF)
    assert "KL(with || without Engram)" in explorer.text.html
    explorer.session.choose_token(3)
    assert explorer.colour.value == (1, OFF)


def test_v41_with_longer_ngrams_is_explored_too():
    explorer = EngramExplorer(finished(random_model(_shared_stream(53, 29))))
    assert re.findall(r"<th scope='row'>(\d)</th>", explorer.details.value) == ["2", "3", "4"]
    assert explorer.figure is not None and explorer.effect.kl.max() > 0


def test_an_untrained_model_of_the_shipped_shape_works(tmp_path):
    twin = untrained_twin(load("tiny-v4-engram", device="cpu"))
    explorer = EngramExplorer(finished(twin, "The code of apple is 37."))
    assert "untrained" in explorer.title.value and explorer.figure is not None


def test_a_recording_has_rows_and_gates_and_with_a_model_the_rest(model):
    trace = finished(model).trace
    explorer = EngramExplorer(replace(trace, origin="recorded"))
    assert "needs the model" in said(explorer) and explorer.figure is None and "Token" in explorer.details.value
    assert OFF not in [value[1] for _, value in explorer.colour.options]
    with_model = EngramExplorer(replace(trace), model)
    assert with_model.figure is not None


def test_a_model_without_engram_says_what_to_choose():
    explorer = EngramExplorer(synthetic_trace(31, kinds=("gqa",)))
    assert "choose tiny-v4-engram" in explorer.title.value and explorer.body.layout.display == "none"


def test_a_working_run_waits_with_switching_off_and_then_measures(model):
    trace = finished(model).trace
    going = FakeRun(trace, model=model)
    explorer = EngramExplorer(session_of(going))
    assert explorer.effect is None and "when the run is over" in said(explorer)
    going.becomes(state="done")
    eventually(lambda: explorer.figure is not None, "the effect is measured")
    assert explorer.effect.length == trace.length


def test_a_new_run_replaces_text_rows_and_effect(explorer, model):
    old = explorer.figure
    explorer.session.attach(finished(model, IDS[::-1]))
    eventually(lambda: explorer.figure not in (None, old), "the chart follows")
    assert explorer.effect.token_ids.tolist() == explorer.session.trace.token_ids.tolist() == IDS[::-1]


def test_a_failure_in_the_thread_is_told(model, monkeypatch):
    monkeypatch.setattr("workbench.widgets.engram.engram_effect", lambda *_: 1 / 0)
    explorer = EngramExplorer(finished(model))
    assert "could not be switched off (ZeroDivisionError" in said(explorer) and explorer.figure is None


def test_a_text_longer_than_is_read_twice_says_so(model, monkeypatch):
    monkeypatch.setattr("workbench.widgets.engram.MOST_TOKENS", 30)
    explorer = EngramExplorer(finished(model))
    explorer.session.choose_token(29)
    assert explorer.figure is not None and OFF not in [value[1] for _, value in explorer.colour.options]
    explorer.session.choose_token(30)
    assert explorer.figure is None and "first 30 tokens" in said(explorer)


def test_closing_stops_following(explorer):
    before = explorer.text.html
    session = explorer.session
    explorer.close()
    session.choose_token(2)
    assert explorer.text.html == before


def test_the_view_stays_small():
    model = load("tiny-v4-engram", device="cpu")
    from workbench.needle import sample_text

    explorer = EngramExplorer(finished(model, sample_text()[:6000]))
    parts = (explorer.text.html, explorer.details.value, str(explorer.view.outputs))
    assert sum(len(part.encode()) for part in parts) < VIEW_BYTES
