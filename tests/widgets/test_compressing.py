"""EntryWeights: the slider and the layer change what is drawn, and tokens stay in sight from layer to layer."""

from __future__ import annotations

import json

import pytest

from workbench.checkpoint import load
from workbench.errors import InputError
from workbench.trace import Trace
from workbench.widgets.compressing import EntryWeights


@pytest.fixture(scope="module")
def model():
    return load("tiny-v4", device="cpu")


def test_it_opens_on_the_tokens_entry_and_follows_the_slider(model):
    widget = EntryWeights(model, Trace.load("needle"), token=101)
    assert (
        widget.layer.value == 1 and widget.entry.value == 25 and "Entry 25 of layer 1 (csa)" in widget.figure.layout.title.text
    )
    own = next(bar for bar in widget.figure.data if bar.name == "own block (series b)" and bar.type == "bar")
    assert own.y[1].startswith("101 ")
    widget.entry.value = 3
    assert "Entry 3" in widget.figure.layout.title.text and "tokens 8–15" in widget.figure.layout.title.text
    assert json.loads(json.dumps(widget.view.outputs))[0]["data"]["text/plain"].startswith("Entry 3")


def test_another_layer_shows_the_entry_of_the_same_tokens(model):
    widget = EntryWeights(model, Trace.load("needle"), token=150)
    widget.layer.value = 2
    assert widget.entry.value == 1 and "Entry 1 of layer 2 (hca)" in widget.figure.layout.title.text
    assert widget.entry.max == 1 and len(json.dumps(widget.view.outputs)) < 250_000
    widget.layer.value = 3
    assert widget.entry.value == 32 and "layer 3 (csa)" in widget.figure.layout.title.text


def test_a_token_of_the_open_block_shows_the_last_entry(model):
    trace = Trace.load("needle")
    assert EntryWeights(model, trace, token=trace.length - 1).entry.value == trace.length // 4 - 1


def test_a_model_that_does_not_fit_is_one_clear_error(model):
    with pytest.raises(InputError, match="another shape"):
        EntryWeights(load("tiny-mla-dsa", device="cpu"), Trace.load("needle"))
    with pytest.raises(InputError, match="tokens 0"):
        EntryWeights(model, Trace.load("needle"), token=5000)
