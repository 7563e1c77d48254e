"""The Microscope: what pressing entries does, what it says when nothing can be edited, and that texts are escaped."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

import workbench as wb
from tests.synthetic import synthetic_trace
from tests.widgets.fakes import FakeRun, eventually
from workbench.errors import InputError
from workbench.figures.microscope import change_chart, choice_chart, entries_html
from workbench.microscope import Edit, Forks
from workbench.widgets.session import session_of

MODEL = wb.load("tiny-v4", device="cpu")
QUERY = 180


@pytest.fixture(scope="module")
def trace():
    run = wb.run(MODEL, wb.sample_text()[:700], max_new_tokens=2)
    assert run.wait(60) and run.trace.length > QUERY + 10
    return run.trace


@pytest.fixture
def scope(trace):
    scope = wb.Microscope(trace, model=MODEL)
    scope.session.layer = 1
    scope.session.choose_token(QUERY)
    yield scope
    scope.close()


def press(scope, entry):
    scope.entries._handle_custom_msg({"type": "click", "token": str(entry)}, [])


def pressed(scope, state):
    return [int(n) for n in re.findall(rf"<button class='{state}' data-token='(\d+)'", scope.entries.html)]


def test_it_shows_what_the_run_chose_and_pressing_edits_it(scope, trace):
    kept = trace.layer(1).selected[QUERY].tolist()
    assert pressed(scope, "kept") == kept and "Nothing is edited" in scope.status.value
    assert scope.change.kl_nats == 0 and scope.token.value == scope.read_at.value == QUERY
    press(scope, kept[2])
    assert pressed(scope, "dropped") == [kept[2]] and scope.change.edit == Edit(1, QUERY, drop=(kept[2],))
    other = pressed(scope, "out")[0]
    press(scope, other)
    assert pressed(scope, "forced") == [other]
    expected = Forks(MODEL, trace.token_ids.tolist()).change(Edit(1, QUERY, (kept[2],), (other,)))
    np.testing.assert_array_equal(scope.change.after, expected.after)
    assert f"KL {expected.kl_nats:.3g} nats" in scope.status.value
    press(scope, kept[2])
    press(scope, other)
    assert pressed(scope, "kept") == kept and scope.change.kl_nats == 0


def test_any_entry_can_be_named_and_all_undone(scope):
    rare = next(e for e in range(45) if e not in pressed(scope, "kept") + pressed(scope, "out"))
    scope.entry.value = rare
    scope.press.click()
    assert pressed(scope, "forced") == [rare]
    scope.undo.click()
    assert not pressed(scope, "forced") and scope.change.edit == Edit(1, QUERY)


def test_the_fork_may_read_on_and_another_query_starts_afresh(scope, trace):
    press(scope, pressed(scope, "kept")[0])
    scope.read_at.value = QUERY + 4
    assert scope.change.read_at == QUERY + 4 and scope.change.edit.drop
    scope.session.choose_token(QUERY - 50)
    assert scope.change.edit == Edit(1, QUERY - 50) and scope.read_at.value == QUERY - 50 == scope.read_at.min
    assert scope.change.read_at < trace.length


def test_the_last_layer_says_that_later_tokens_do_not_see_it(scope):
    scope.session.layer = 3
    press(scope, pressed(scope, "kept")[0])
    scope.read_at.value = QUERY + 1
    assert "reaches no later token" in scope.status.value


def test_what_cannot_be_done_is_said_and_changes_nothing(scope):
    before = scope.change
    scope.edit(drop=(9999,))
    assert "cannot be dropped" in scope.status.value and scope.change is before
    press(scope, pressed(scope, "kept")[0])
    assert scope.change.edit.drop != (9999,)


def test_layers_that_choose_nothing_are_told_apart(scope):
    scope.session.layer = 2
    assert scope.change is None and scope.body.layout.display == "none" and "Layer 2 chooses nothing" in scope.status.value
    assert scope.press.disabled and scope.layer.value is None
    scope.toggle(3)
    scope.layer.value = 3
    assert scope.session.layer == 3 and scope.change is not None and not scope.press.disabled


def test_models_and_recordings_that_do_not_fit_are_refused_or_told(trace):
    with pytest.raises(InputError, match="give its model"):
        wb.Microscope(trace)
    other = wb.Microscope(synthetic_trace(40), model=MODEL)
    assert "of another shape" in other.status.value and other.change is None
    dense = wb.load("tiny-gqa", device="cpu")
    run = wb.run(dense, "The code of apple", max_new_tokens=0)
    run.wait()
    assert "attends to every token" in wb.Microscope(run).status.value
    empty = replace(trace, token_ids=trace.token_ids[:0], token_texts=(), layers=(), prompt_length=0)
    assert "Nothing was read yet" in wb.Microscope(empty, model=MODEL).status.value


def test_a_working_run_is_left_alone_until_it_pauses(trace):
    run = FakeRun(trace, model=MODEL)
    scope = wb.Microscope(run)
    assert "at work" in scope.status.value and scope.change is None
    scope.session.layer = 1
    run.pause()
    eventually(lambda: scope.change is not None, "the paused run can be edited")
    run.becomes(state="done")


def test_texts_are_escaped_and_both_pictures_small(trace):
    nasty = replace(trace, token_texts=tuple("<b>&amp;</b>" for _ in trace.token_texts), model="<i>m</i>")
    forks = Forks(MODEL, trace.token_ids.tolist())
    choice = forks.choice(1, QUERY)
    change = forks.change(Edit(1, QUERY, drop=choice.kept[:1], force=tuple(choice.best_left_out(1))))
    html = entries_html(nasty, choice, change)
    assert "<b>&amp;amp;" not in html and "&lt;b&gt;" in html and len(html) < 60_000
    figure = change_chart(nasty, change, lambda i: f"<u>{i}</u>", followed_by=7)
    drawn = figure.to_json()
    assert "<u>" not in drawn and "<i>" not in drawn and len(drawn) < 60_000
    assert any("came next" in name for name in figure.layout.yaxis.ticktext)
    after, before = figure.data
    ids = change.likeliest(8)
    assert list(before.customdata[::-1][:7]) == [change.before[i] for i in ids[:7]]
    assert list(after.customdata[::-1][:7]) == [change.after[i] for i in ids[:7]]


def test_scores_stand_against_the_attention_nothing_left_out_would_give(scope, trace):
    choice = Forks(MODEL, trace.token_ids.tolist()).choice(1, QUERY)
    figure = choice_chart(trace, choice)
    out, kept = figure.data
    assert sorted(kept.customdata) == sorted(choice.kept) and len(out.x) + len(kept.x) == choice.visible
    np.testing.assert_array_equal(kept.x, choice.scores[kept.customdata])
    np.testing.assert_allclose(kept.y, np.maximum(choice.mass[kept.customdata], 1e-6))
    best = set(np.argsort(-choice.mass)[: len(choice.kept)].tolist())
    assert f"recall@8 {len(best & set(choice.kept)) / 8:.0%}" in figure.layout.title.text.replace("<br>", " ")
    assert scope.scores.outputs[0]["data"]["text/plain"] == figure.layout.title.text.replace("<br>", " ")


def test_it_follows_the_session_of_other_views(trace):
    scope = wb.Microscope(trace, model=MODEL)
    session_of(trace).choose_token(99)
    assert scope.token.value == 99
    scope.token.value = 120
    assert session_of(trace).token == 120
    scope.close()
    session_of(trace).choose_token(90)
    assert scope.token.value == 120
    assert json.dumps(scope.chart.outputs[0]["data"]["application/vnd.plotly.v1+json"])
