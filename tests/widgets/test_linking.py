"""A token chosen in any view is chosen in all, and scrubbing through the steps sends each view one message a move."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.synthetic import synthetic_trace
from tests.widgets.fakes import FakeRun, eventually
from workbench.widgets.attention import AttentionExplorer
from workbench.widgets.caches import CacheSlots
from workbench.widgets.engram import EngramExplorer
from workbench.widgets.memory import KVCacheGrowth
from workbench.widgets.session import session_of
from workbench.widgets.timeline import OverlapTimeline


class Views:
    """All views of one recording: a prompt of 31 tokens read in chunks of 13, then 16 tokens one by one."""

    def __init__(self, source: Any) -> None:
        self.explorer, self.other = AttentionExplorer(source), AttentionExplorer(source)
        self.memory, self.timeline = KVCacheGrowth(source), OverlapTimeline(source)
        self.slots, self.engram = CacheSlots(source), EngramExplorer(source)
        self.session = self.explorer.session

    def click(self, x: Any, data: Any = None) -> None:
        """What the page sends of a click on a chart."""
        self.session.clicks._handle_custom_msg({"type": "click", "of": self.session.number, "x": x, "data": data}, [])

    def tokens(self) -> dict[str, int]:
        """What each view says the chosen token is."""
        first, second = self.explorer, self.other
        marked = re.findall(r'<bdi class="[^"]*\bq\b[^"]*" data-token="(\d+)"', first.text.html)
        found = {
            "text": int(marked[0]),
            "map": first.map.mark,  # a cell is a query: the trace is short
            "field": first.token.value,
            "chart of the query": int(re.search(r"query token (\d+)", first.chart["layout"]["title"]["text"])[1]),
            "line": int(re.search(r"token=(\d+)", first.line.value)[1]),
            "other explorer": second.map.mark,
            "slots": self.slots.token.value,
            "timeline": int(re.search(r"token (\d+)", self.timeline.figure.layout.annotations[-1].text)[1]),
            "KV chart": int(self.memory.figure.layout.shapes[-1].x0) - 1,
            "engram": int(re.search(r'class="[^"]*\bq\b[^"]*" data-token="(\d+)"', self.engram.text.html)[1]),
        }
        return found

    def steps(self) -> dict[str, int]:
        marks = [a.text for a in self.memory.figure.layout.annotations if a.text.startswith("step ")]
        return {
            "KV chart": int(re.match(r"step (\d+):", marks[0])[1]),
            "KV slider": self.memory.step.value,
            "timeline": int(re.match(r"Step (\d+):", self.timeline.figure.layout.title.text)[1]),
            "timeline's mark": self.timeline.figure.layout.shapes[-1].x0,
            "timeline slider": self.timeline.step.value,
            "explorer's slider": self.explorer.text_panel.step.value,
        }

    def all_show(self, token: int) -> None:
        assert set(self.tokens().values()) == {token}, self.tokens()
        assert set(self.steps().values()) == {self.session.trace.step_of_token(token)}, self.steps()


@pytest.fixture
def views() -> Views:
    return Views(synthetic_trace(47, prompt_length=31, prefill_chunk=13))


CHOICES = {
    "click in the text": (lambda v: v.explorer.text._handle_custom_msg({"type": "click", "token": "20"}, []), 20),
    "key in the text": (lambda v: v.explorer.text._handle_custom_msg({"type": "move", "by": -1}, []), 29),
    "click on the map": (lambda v: v.explorer.map._handle_custom_msg({"type": "click", "row": 41, "column": 3}, []), 41),
    "other explorer's map": (lambda v: v.other.map._handle_custom_msg({"type": "click", "row": 5, "column": 1}, []), 5),
    "query token": (lambda v: setattr(v.explorer.token, "value", 44), 44),
    "KV chart's slider": (lambda v: setattr(v.memory.step, "value", 5), 33),
    "timeline's slider": (lambda v: setattr(v.timeline.step, "value", 0), 12),
    "explorer's slider": (lambda v: setattr(v.explorer.text_panel.step, "value", 7), 35),
    "cache slots": (lambda v: setattr(v.slots.token, "value", 2), 2),
    "engram's text": (lambda v: v.engram.text._handle_custom_msg({"type": "click", "token": "38"}, []), 38),
    "click on the KV chart, where a step ends": (lambda v: v.click(35.2), 34),
    "click on the KV chart, within the prompt": (lambda v: v.click(20.4), 19),
    "click left of the KV chart's first token": (lambda v: v.click(-3.0), 0),
    "click right of its last one": (lambda v: v.click(1e12), 46),
    "click on a step of the timeline": (lambda v: v.click(9.75, 3), 31),
    "click on a span of a chunk of the prompt": (lambda v: v.click("compute", 1), 25),
    "a line of Python": (lambda v: v.explorer.look(layer=1, token=37), 37),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_token_chosen_anywhere_is_chosen_everywhere(views, choice):
    views.all_show(30)  # where the prompt ends
    choose, token = CHOICES[choice]
    choose(views)
    views.all_show(token)


def test_scrubbing_forward_and_back_sends_each_view_one_message_a_move(views):
    sent: dict[str, int] = {}
    parts = {
        "map": views.explorer.map,
        "text": views.explorer.text,
        "strip": views.explorer.strip,
        "facts": views.explorer.facts,
        "KV chart": views.memory.view,
        "timeline": views.timeline.on_show.view,
        "another's slider": views.memory.step,
        "field": views.explorer.token,
    }
    for name, part in parts.items():
        part.send_state = lambda key=None, name=name: sent.update({name: sent.get(name, 0) + 1})  # type: ignore[method-assign]
    slider = views.explorer.text_panel.step
    last = slider.max
    path = [3, 4, 5, 6, 5, 4, last, last - 1, 0, 1]
    for moves, step in enumerate(path, start=1):
        slider.value = step
        views.all_show(views.session.trace.step_end(step) - 1)
        assert sent == dict.fromkeys(parts, moves), f"step {step}"


def test_the_newest_step_of_a_run_is_followed_again_once_it_is_chosen():
    traces = {n: synthetic_trace(n, prompt_length=31, prefill_chunk=13) for n in (33, 40, 47)}
    run = FakeRun(traces[33])
    explorer, memory = AttentionExplorer(run), KVCacheGrowth(run)
    slider = explorer.text_panel.step
    slider.value = 1
    run.becomes(trace=traces[40], kind="token")
    eventually(lambda: slider.max == memory.step.max == traces[40].steps - 1, "the sliders grow")
    assert (slider.value, memory.step.value, explorer.map.mark) == (1, 1, 25)
    memory.step.value = memory.step.max
    assert explorer.session.follow and slider.value == slider.max
    run.becomes(trace=traces[47], kind="token")
    eventually(lambda: explorer.map.rows == 47 and slider.max == traces[47].steps - 1, "the run is drawn")
    assert slider.value == slider.max and explorer.map.mark == 46
    run.becomes(state="done")
    eventually(lambda: explorer.session.state == "done", "the run ends")
    slider.value = 2
    slider.value = slider.max
    assert not explorer.session.follow  # nothing comes any more


def test_a_closed_explorer_follows_no_longer():
    trace = synthetic_trace(47, prompt_length=31, prefill_chunk=13)
    explorer, session = AttentionExplorer(trace), session_of(trace)
    slider = explorer.text_panel.step
    explorer.close()
    explorer.close()
    before = slider.value
    session.choose_step(0)
    assert slider.value == before != 0
