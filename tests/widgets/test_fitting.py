"""Will it fit: each control changes what is shown, and what cannot be leaves the charts alone."""

from __future__ import annotations

import json

import pytest

from workbench import cost
from workbench.agent import Turn, agent_session
from workbench.errors import InputError
from workbench.widgets.fitting import CardsNeeded, WillItFit


@pytest.fixture
def widget():
    made = WillItFit("v4-flash", "h200", cards=8, tp=8, batch=8, turns=agent_session(200_000, seed=2))
    yield made
    made.close()


def test_it_shows_what_fit_says(widget):
    expected = cost.fit("v4-flash", 200_000, "h200", cards=8, tp=8, batch=8)
    assert widget.fit == expected and "Fits." in widget.status.value and f"{expected.most_sequences:,}" in widget.status.value
    assert "modelled" in widget.bar.layout.title.text and "modelled" in widget.figure.layout.title.text
    assert "made-up" in json.dumps([child.value for child in widget.children if hasattr(child, "value")])
    for view in (widget.view, widget.grown):
        assert len(json.dumps(view.outputs)) < 250_000


@pytest.mark.parametrize(
    ("control", "value"), [("preset", "gqa-8"), ("device", "b200"), ("cards", 16), ("tp", 2), ("batch", 32)]
)
def test_every_control_changes_the_numbers(widget, control, value):
    before = widget.fit, widget.status.value, widget.bar.to_json(), widget.figure.to_json()
    getattr(widget, control).value = value
    after = widget.fit, widget.status.value, widget.bar.to_json(), widget.figure.to_json()
    assert before[0] != after[0] and before[2] != after[2] and before[3] != after[3]


def test_playing_goes_through_the_turns(widget):
    widget.play.value = 5
    turn = widget.turns[5]
    assert widget.length.value == turn.context and widget.fit.kv_bytes["total"] < 1e9
    assert f"Turn 5, {turn.role}" in widget.message.value and f"{turn.tokens:,}" in widget.message.value
    assert f"{turn.context:,} tokens" in widget.table.value


def test_a_full_card_says_at_which_turn(widget):
    widget.preset.value = "gqa-8"
    widget.cards.value = widget.tp.value = 1
    turn = widget.turns[widget.filling.full_at]
    assert "Does not fit." in widget.status.value and f"Full at turn {turn.number}" in widget.status.value
    assert widget.bar.layout.title.text.startswith("DOES NOT FIT")


def test_weights_alone_can_be_too_much(widget):
    widget.preset.value, widget.device.value = "v4-pro", "rtx-4090"
    assert "weights alone" in widget.status.value


def test_what_cannot_be_is_one_line_and_leaves_the_charts(widget):
    before = widget.bar
    widget.cards.value = 4
    assert "tp must divide cards" in widget.status.value and "setting before" in widget.status.value and widget.bar is before
    widget.cards.value = 8
    assert "Fits." in widget.status.value


def test_a_turn_is_shown_as_text(widget):
    made = WillItFit(turns=[Turn(0, "tool", "<script>", 2000, 2000)])
    assert "<script>" not in made.message.value and "&lt;script&gt;" in made.message.value


@pytest.mark.parametrize("wrong", [{"preset": "v9"}, {"device": "abacus"}, {"cards": 3}, {"batch": 0}, {"turns": []}])
def test_a_start_that_cannot_be_is_one_clear_error(wrong):
    with pytest.raises(InputError):
        WillItFit(**wrong)


def test_cards_follow_length_and_batch():
    widget = CardsNeeded(length=2**20, batch=1)
    first = {(each.device.name, each.preset.name): each.cards for each in widget.found}
    html = widget.table.value
    widget.batch.value = 64
    second = {(each.device.name, each.preset.name): each.cards for each in widget.found}
    assert first["h200", "gqa-8"] == 2 and second["h200", "gqa-8"] is None  # 64 x 262 GB
    assert widget.table.value != html and "64 sessions" in widget.table.value
    widget.length.value = 4096
    assert "4,096 tokens" in widget.table.value and len(widget.table.value) < 60_000
