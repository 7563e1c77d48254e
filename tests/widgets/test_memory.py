import json
from dataclasses import replace

import pytest

from tests.synthetic import synthetic_trace
from tests.widgets.fakes import FakeRun, eventually
from workbench.widgets.memory import KVCacheGrowth

TRACE = synthetic_trace(47, prompt_length=31, prefill_chunk=13)
BUDGET = 250_000  # bytes of a view


def chart_of(view):
    return view.outputs[0]["data"]["application/vnd.plotly.v1+json"]


def test_moving_the_slider_marks_that_step_and_shows_its_bytes():
    widget = KVCacheGrowth(TRACE)
    widget.step.value = 2
    assert widget.figure.layout.shapes[0].x0 == TRACE.step_end(2) == 31
    assert chart_of(widget.view)["layout"]["shapes"][0]["x0"] == 31
    assert "After step 2: L = 31 tokens" in widget.panel.value


def test_the_axis_can_be_logarithmic():
    widget = KVCacheGrowth(TRACE)
    assert widget.figure.layout.yaxis.type == "linear" and widget.figure.data[0].stackgroup
    widget.scale.value = True
    assert widget.figure.layout.yaxis.type == "log" and not any(line.stackgroup for line in widget.figure.data)


def test_a_run_that_has_done_nothing_yet_is_shown_as_empty_and_then_followed():
    empty = replace(
        TRACE, token_ids=TRACE.token_ids[:0], prompt_length=0, layers=(), engram=(), step_starts=TRACE.step_starts[:0],
        cache_bytes={}, cache_reserved=TRACE.cache_reserved[:0],
    )  # fmt: skip
    run = FakeRun(empty)
    widget = KVCacheGrowth(run)
    assert "No step" in widget.panel.value and widget.step.disabled
    run.becomes(trace=TRACE, state="done")
    eventually(lambda: "L = 47 tokens" in widget.panel.value, "the chart follows the run")
    assert not widget.step.disabled


@pytest.mark.parametrize("log", [False, True])
def test_a_long_run_stays_within_the_budget_of_a_view(log):
    widget = KVCacheGrowth(synthetic_trace(3001, prompt_length=11, kinds=("window", "csa", "hca")))
    widget.scale.value = log
    assert len(json.dumps(widget.view.outputs)) + len(widget.panel.value) < BUDGET
