"""Pictures of what fits: their numbers are those given, and every title says where they come from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.synthetic import synthetic_trace
from workbench import cost
from workbench.agent import Turn, agent_session
from workbench.cost.filling import all_cards_needed, filling, when_full
from workbench.errors import InputError
from workbench.figures.fitting import (
    card_use,
    cards_table_html,
    choices_html,
    filling_chart,
    measured_and_modelled,
    pauses_chart,
    seconds_text,
    session_context,
    sessions_chart,
)


def test_roles_add_up_to_the_context():
    turns = agent_session(100_000, seed=1)
    fig = session_context(turns)
    assert sum(data.y[-1] for data in fig.data) == 100_000 and "made-up" in fig.layout.title.text
    tool = next(data for data in fig.data if data.name == "tool")
    assert tool.y[-1] == sum(turn.tokens for turn in turns if turn.role == "tool")
    assert len(fig.to_json()) < 250_000
    for area in fig.data:  # a pattern without a ground of its own would leave the area empty
        assert not area.fillpattern.shape or area.fillpattern.bgcolor == area.fillcolor


def test_the_cross_stands_at_the_first_turn_that_does_not_fit():
    contexts = [100_000 * n for n in range(1, 11)]
    fill = filling(contexts, "gqa-8", "h100", cards=1, batch=1)
    fig = filling_chart([fill], at=300_000)
    cross = next(data for data in fig.data if data.name.startswith("full"))
    assert cross.x[0] == contexts[fill.full_at] and cross.y[0] > fill.room_bytes
    room = next(data for data in fig.data if data.name.startswith("room"))
    assert set(room.y) == {fill.room_bytes} and fig.layout.shapes[0].x0 == 300_000
    assert "modelled" in fig.layout.title.text
    assert not [data for data in filling_chart([filling([10], "gqa-8", "h100")]).data if data.name.startswith("full")]


def test_pieces_of_the_bar_fill_the_card():
    found = cost.fit("v4-flash", 65_536, "h200", cards=8, tp=8, batch=3)
    fig = card_use(found)
    assert sum(bar.x[0] for bar in fig.data) == pytest.approx(found.device.memory_bytes)
    by_name = {bar.name.split()[0]: bar.x[0] for bar in fig.data}
    assert by_name["weights"] == found.weight_bytes and by_name["compressed"] == found.kv_bytes["compressed"]
    assert fig.layout.title.text.startswith("fits") and "modelled" in fig.layout.title.text
    assert card_use(cost.fit("v4-pro", 10, "h100")).layout.title.text.startswith("DOES NOT FIT")
    assert "unknown" in card_use(cost.fit("mha", 10, "h100")).layout.title.text


def test_measured_points_are_what_was_counted_and_the_line_is_the_formula():
    trace = replace(synthetic_trace(97), storage="fp32")
    fig = measured_and_modelled(trace, [10_007])
    line, points = fig.data
    assert "modelled" in line.name and "measured" in points.name
    assert points.y[-1] == sum(int(of_part[-1]) for of_part in trace.cache_bytes.values()) and points.x[-1] == 97
    assert line.x[-1] == 10_007 and line.y[-1] > line.y[0]
    with pytest.raises(InputError, match="nothing was filled"):
        measured_and_modelled(replace(trace, cache_bytes={}), [10])


def test_the_table_has_a_row_for_each_device_and_marks_what_is_special():
    found = all_cards_needed(2**20, 2)
    html = cards_table_html(found, 2**20, 2)
    assert html.count("<tr>") == 24 and html.count("<td") == len(found) and "modelled" in html
    assert "more than 64" in html and "*" in html and "°" in html and "†" in html and len(html) < 60_000
    rows = {row.split("</th>")[0].split(">")[-1]: row for row in html.split("<tr>")}
    assert "°" not in rows["B200"] and "°" in rows["A100 80 GB SXM"]


def test_what_can_be_done_is_told_with_its_numbers():
    html = choices_html(when_full("v4-flash", 2**20, "h100", cards=8, tp=8), "<x>")
    assert html.count("<tr>") == 5 and "modelled" in html and "3.69 GB" in html and "142 ms" in html and "4.92 s" in html
    assert "unknown" in choices_html(when_full("v4-flash", 1000, "ascend-910c"), "x")


def test_bars_of_sessions_and_pauses_are_those_given():
    fits = [cost.fit("v4-flash", 2**20, "h200", cards=8, tp=tp) for tp in (8, 1)]
    assert list(sessions_chart(fits, ["<8>", "1"]).data[0].x) == [fit.most_sequences for fit in fits]
    assert sessions_chart(fits, ["<8>", "1"]).data[0].y[0] == "&lt;8&gt;"
    choices = {name: when_full(name, 4096, "h100") for name in ("gqa-8", "v4-flash")}
    fig = pauses_chart(choices)
    recompute, swap = fig.data
    assert 10 ** fig.layout.xaxis.range[0] < min(swap.x) / 5, "the shortest bar can be seen"
    assert recompute.x[1] == choices["v4-flash"][2].seconds and swap.x[0] == choices["gqa-8"][3].seconds
    assert pauses_chart({"a": when_full("v4-flash", 10, "m3-ultra")}).data[1].text[0] == "unknown"


NOTHING = [(session_context, ([],)), (filling_chart, ([],)), (sessions_chart, ([], [])), (pauses_chart, ({},))]


@pytest.mark.parametrize(("chart", "args"), [*NOTHING, (cards_table_html, ([], 1, 1))])
def test_nothing_to_draw_is_one_clear_error(chart, args):
    with pytest.raises(InputError):
        chart(*args)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "unknown"), (0.0, "nothing"), (0.142, "142 ms"), (4.92, "4.92 s"), (288.3, "4.8 min")]
)
def test_seconds_read_well(seconds, text):
    assert seconds_text(seconds) == text


def test_texts_of_turns_are_not_markup():
    assert session_context([Turn(0, "user", "<b>", 10, 10)]).data[1].y[0] == 10
